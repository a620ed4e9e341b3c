"""Checks that a pass moves the program's outputs no further than it declares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.errors import PassError
from tfqc.instruments.base import Instrument
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import Schedule
from tfqc.ir.types import TensorType, evaluate
from tfqc.passing import Pass


class CheckNumerics(Instrument):
    """Runs the program before and after each pass that is not lossy, on random inputs of its own types."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.errors: dict[str, float] = {}

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        allowed = item.moves(previous)
        if allowed.kind == "lossy" or not program.has_weights:
            return
        inputs = example_call(previous, self.seed, program)
        with torch.no_grad():
            want, got = _tensors(previous(**inputs)), _tensors(program(**inputs))
        error = max(relative_error(a, b) for a, b in zip(want, got, strict=True))
        self.errors[f"#{number} {item.name}"] = error
        if error > allowed.tolerance or error != error:
            raise PassError(
                f"{item.name} declares {allowed.kind} numerics (≤ {allowed.tolerance:g}) but moved the "
                f"outputs by {error:.2e} relative."
            )


def _tensors(result: object) -> list[Tensor]:
    # A tuple subclass is a leaf to pytree.
    leaves = pytree.tree_leaves(tuple(result) if isinstance(result, tuple) else result)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def relative_error(want: Tensor, got: Tensor) -> float:
    """max |got − want| / max |want|; 0 for bit-equal tensors."""
    if torch.equal(want, got):
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def example_call(program: Program, seed: int = 0, scheduled: Program | None = None) -> dict[str, object]:
    """Random inputs of a program's types, nested as the model wants them; the timestep is one of its schedule's."""
    generator = torch.Generator().manual_seed(seed)
    schedule = (scheduled or program).table(Schedule).get("schedule")
    call: dict[str, object] = {}
    for item in program.inputs:
        type_ = program.types.get(item.name)
        if not isinstance(type_, TensorType):
            continue
        shape = [evaluate(d, program.symbols) for d in type_.shape]
        if item.role is Role.TIME:
            value = torch.full(shape, schedule.timesteps[0] if schedule else 10, dtype=type_.dtype)
        elif type_.dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(type_.dtype)
        else:
            value = torch.randint(0, item.domain or 2, shape, generator=generator).to(type_.dtype)
        target = call
        for key in item.path[:-1]:
            target = target.setdefault(key, {})  # type: ignore[assignment]
        target[item.path[-1]] = value
    return call
