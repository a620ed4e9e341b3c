"""Checks that a pass moves the program's outputs no further than it declares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tfqc.errors import PassError
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import Schedule
from tfqc.ir.types import evaluate
from tfqc.passing.base import Pass
from tfqc.passing.instrument import Instrument
from tfqc.runtime.outputs import taken_apart


class CheckNumerics(Instrument):
    """Runs the program before and after each pass that is not lossy, on random inputs of its own types.

    It is run at the first and at the last timestep of its schedule: rows that are out of order show there.
    `errors` maps `#number name` of each pass checked to the relative error seen.

    Raises:
        PassError: outputs moved further than declared: not max |a − b| ≤ tolerance · max |a|.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.errors: dict[str, float] = {}

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        allowed = item.moves(previous)
        if allowed.kind == "lossy" or not program.has_weights:
            return
        error, _ = self.error(program, previous)
        self.errors[f"#{number} {item.name}"] = error
        if error > allowed.tolerance:
            raise PassError(
                f"{item.name} declares {allowed.kind} numerics (≤ {allowed.tolerance:g}) "
                f"but moved the outputs by {error:.2e} relative."
            )

    def error(self, program: Program, previous: Program) -> tuple[float, float]:
        """How far the outputs moved, and the timestep at which they moved furthest."""
        schedule = program.table(Schedule).get("schedule") or previous.table(Schedule).get("schedule")
        timesteps = (schedule.timesteps[0], schedule.timesteps[-1]) if schedule else (10, 1)
        return max((self._error(program, previous, timestep), timestep) for timestep in timesteps)

    def _error(self, program: Program, previous: Program, timestep: float) -> float:
        inputs = example_call(previous, self.seed, timestep)
        with torch.no_grad():
            want, got = tensors_of(previous(**inputs)), tensors_of(program(**inputs))
        if len(want) != len(got):
            return float("inf")
        return max((relative_error(a, b) for a, b in zip(want, got, strict=True)), default=0.0)


def relative_error(want: Tensor, got: Tensor) -> float:
    """max |got − want| / max |want|, so that `<= tolerance` means max |got − want| ≤ tolerance · max |want|.

    Equal entries do not count, equal infinities and two NaNs included. Infinite for other shapes or dtypes,
    for NaN or infinity on one side alone, and where nothing but zeros was wanted.
    """
    if want.shape != got.shape or want.dtype != got.dtype:
        return float("inf")
    a, b = want.to(torch.float64), got.to(torch.float64)
    differ = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(differ.any()):
        return 0.0
    scale = a.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float(((b - a)[differ].abs().max() / scale).nan_to_num(float("inf"), float("inf")))


def example_call(program: Program, seed: int = 0, timestep: float = 10) -> dict[str, Any]:
    """Random inputs of a program's types, nested as the model wants them; one timestep for all entries."""
    generator = torch.Generator().manual_seed(seed)
    call: dict[str, Any] = {}
    for item in program.inputs:
        type_ = item.type
        shape = [evaluate(d, program.symbols) for d in type_.shape]
        if item.role is Role.TIME:
            value = torch.full(shape, timestep).to(type_.dtype)
        elif type_.dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(type_.dtype)
        else:
            value = torch.randint(0, item.domain or 2, shape, generator=generator).to(type_.dtype)
        target = call
        for key in item.path[:-1]:
            target = target.setdefault(key, {})
        target[item.path[-1]] = value
    return call


def tensors_of(result: object) -> list[Tensor]:
    """The tensors that a program returned, in order."""
    return [tensor for _, tensor in taken_apart(result)[0]]
