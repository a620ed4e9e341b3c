"""Calls of a model as calibration data, where no sampler makes any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, write_tensors
from tfqc.ir.program import Program
from tfqc.runtime.call import EACH
from tfqc.runtime.fixed import has_fixed_value
from tfqc.runtime.groups import Given, groups_of
from tfqc.runtime.plan import Plan
from tfqc.sampling.data import Calibration


@dataclass(frozen=True)
class ModelCalls:
    """What a model was called with, recorded by its user: each call's inputs by dotted name (`added.time_ids`).

    The model sees them as they are: no image is sampled. `cond` and `shared` are of the first call, as of
    `Calibration`; guidance and seed have no meaning.

    Raises:
        CalibrationError: no call, or an input that holds NaN or infinity.
    """

    calls: tuple[Mapping[str, Tensor], ...]
    guidance: float = 1.0
    seed: int = 0
    shared: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if not self.calls:
            raise CalibrationError("Calibration needs at least one call of the model: the list is empty.")
        for number, call in enumerate(self.calls):
            for name, value in call.items():
                if value.is_floating_point() and bool(torch.isnan(value).any()):
                    raise CalibrationError(f"Calibration: {name} holds NaN in call {number}.")

    def __len__(self) -> int:
        return len(self.calls)

    @property
    def cond(self) -> Mapping[str, Tensor]:
        """Inputs of the first call."""
        return self.calls[0]

    @classmethod
    def of(cls, calls: Iterable[Any]) -> ModelCalls:
        """From keyword arguments of calls; tensors and numbers count, at any depth.

        Raises:
            CalibrationError: a call that is no mapping from names of arguments.
        """
        found: list[Mapping[str, Tensor]] = []
        for number, call in enumerate(calls):
            if not isinstance(call, Mapping):
                raise CalibrationError(
                    f"calibration[{number}] is a {type(call).__name__}: give each call as a mapping from the model's "
                    "arguments to their values."
                )
            flat: dict[str, Tensor] = {}
            _flatten("", call, flat)
            found.append(flat)
        return cls(tuple(found))

    @classmethod
    def of_noise(
        cls, data: Calibration, sample: str, dtype: torch.dtype, time: str | None, timesteps: Iterable[float]
    ) -> ModelCalls:
        """The model is called with the noise itself at each time, where no sampler makes images of it.

        Args:
            sample, dtype: what the noise is given as. time: the input that the time is in, None where there is none.
        """
        calls: list[Mapping[str, Tensor]] = []
        for first in range(0, len(data), data.batch_size):
            rows = slice(first, first + data.batch_size)
            noise = data.latents[rows].to(dtype)
            given = {**data.shared, **{name: value[rows] for name, value in data.cond.items()}, sample: noise}
            for t in timesteps:
                times = {name: factor * t for name, factor in data.following.items()}
                if time is not None:
                    times[time] = torch.full((len(noise),), t)
                calls.append({**given, **times})
        return cls(tuple(calls), 1.0, data.seed)

    def check_fixed(self, program: Program) -> None:
        """Refuse calls that give an input another value than the one that the program was captured for.

        Raises:
            CalibrationError: a call has another value.
        """
        for path, value in program.constants.items():
            name = ".".join(path)
            given = [call[name] for call in self.calls if name in call]
            if isinstance(value, str) and not all(has_fixed_value(value, tensor) for tensor in given):
                raise CalibrationError(
                    f"{program.model} decides by the values of {name}, so it is compiled for one of them, and has "
                    "several here: calibrate on one (a single prompt, without guidance), or compile a module around "
                    "it that takes texts without padding and gives it masks of ones."
                )

    def in_groups(self, plan: Plan) -> ModelCalls:
        """For a model that computes a fixed number of images at once: calls of so many, by the paths of its inputs
        (`x.*` for a list of images); the last of a call's images again, where there are too few."""
        found: list[Mapping[str, Tensor]] = []
        for call in self.calls:
            found_at = {i.name: _at(call, i.path) for i in plan.inputs}
            given = {name: value for name, value in found_at.items() if value is not None}
            whole = len(given) == len(found_at)  # else it is refused for what it lacks
            for group in (groups_of(plan, given) if whole else None) or [given]:
                rows = {name: v[0][None] if isinstance(v, list) else v for name, v in group.items()}
                found.append({".".join(i.path): rows[i.name] for i in plan.inputs if i.name in rows})
        return replace(self, calls=tuple(found))

    def times(self, name: str) -> tuple[float, ...]:
        """Those that the model was called at, in order.

        Raises:
            CalibrationError: a call that has none.
        """
        for number, call in enumerate(self.calls):
            if name not in call:
                raise CalibrationError(f"calibration[{number}] has no {name!r}, the model's time.")
        return tuple(t for call in self.calls for t in call[name].flatten().float().tolist())

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        write_tensors(path, {f"call.{i:06d}.{k}": v for i, call in enumerate(self.calls) for k, v in call.items()}, {})

    @classmethod
    def load(cls, path: Path) -> ModelCalls:
        """Inverse of `save`.

        Raises:
            CalibrationError: the file holds no calls.
        """
        tensors, _ = read_tensors(path, CalibrationError)
        calls: dict[str, dict[str, Tensor]] = {}
        for name in sorted(tensors):
            part, _, rest = name.partition(".")
            number, _, own = rest.partition(".")
            if part != "call" or not own:
                raise CalibrationError(f"{path} holds no calls of a model: {name[:100]!a} is no input of one.")
            calls.setdefault(number, {})[own] = tensors[name]
        return cls(tuple(calls.values()))


def load_calibration(path: Path) -> Calibration | ModelCalls:
    """What `Calibration.save` or `ModelCalls.save` wrote.

    Raises:
        CalibrationError: the file holds neither.
    """
    try:
        return ModelCalls.load(path)
    except CalibrationError:
        return Calibration.load(path)


def _at(call: Mapping[str, Tensor], path: tuple[str, ...]) -> Given | None:
    """The input of a call; entries of a list, where the path is that of one."""
    name = ".".join(path)
    if name in call or path[-1] != EACH:
        return call.get(name)
    entries = [call[f"{name[:-1]}{number}"] for number in range(len(call)) if f"{name[:-1]}{number}" in call]
    return entries or None


def _flatten(path: str, value: Any, into: dict[str, Tensor]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():  # pyright: ignore[reportUnknownVariableType]
            _flatten(f"{path}.{key}" if path else str(key), item, into)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
            _flatten(f"{path}.{key}", item, into)
    elif isinstance(value, Tensor):
        into[path] = value.detach()
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        into[path] = torch.tensor(value)
