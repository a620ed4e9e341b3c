"""Calls of a model as calibration data, where no sampler makes any."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, write_tensors
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
