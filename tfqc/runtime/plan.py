"""What a compiled model knows of itself: its inputs, its tables, how a call becomes calls of its functions."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Input:
    """One tensor of a call: where it stands in it (`path`), its dtype, and its shape in numbers and symbols.

    A path that ends with `*` is of a list with a tensor for each image: its shape is that of an entry, as [1, ...].

    `role` is what changes it: every step (`sample`, `time`) or every image (`request`). Times of tokens or frames are
    samples, too: only one that is a number for each image is `time`.
    """

    name: str
    role: str
    path: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Table:
    """A tensor of rows over the schedule, made from one output of the time function.

    With a `label` (a request input of class labels) it has `classes` rows for each timestep, one for each label.
    """

    tensor: str
    output: int
    encoding: str = "fp"
    scale: str = ""
    zero_point: str = ""
    label: str = ""
    classes: int = 1


@dataclass(frozen=True)
class Plan:
    """How a call of the model becomes calls of its functions.

    `arguments` are the names of the model's arguments in order, `constants` what was captured of those that are no
    tensors (path in the call, value; `*` is any entry of a list, one for each image), `guards` comparisons over the
    symbols of the shapes. `label_rows` maps parameters of the step function to (input of class labels, how many labels
    there are): the parameter is row * labels + label.
    `per_image` are the request inputs that have a row for each image. The other dictionaries map parameters of the step
    function to outputs of `begin` and of `time`. `outputs` is the structure of what the model returns
    (`tfqc.runtime.outputs`); None for a tensor, or a tuple of them.
    """

    inputs: tuple[Input, ...]
    arguments: tuple[str, ...]
    constants: tuple[tuple[tuple[str, ...], Any], ...] = ()
    guards: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    policy: str = "recompute"
    row: str = ""
    label_rows: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    per_image: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    activations: tuple[str, ...] = ()
    hoisted: Mapping[str, int] = field(default_factory=dict)
    request_tables: Mapping[str, int] = field(default_factory=dict)
    outputs: Any = field(default=None, repr=False)  # emitted code that has one says so in a line of its own

    @property
    def sample(self) -> Input:
        """What is denoised; the first, where there are several."""
        return next(i for i in self.inputs if i.role == "sample")

    @property
    def time(self) -> Input | None:
        """The timestep; None for a model that is told none."""
        return next((i for i in self.inputs if i.role == "time"), None)


class UnknownTimestepWarning(UserWarning):
    """The first call of a loaded model is at a time that it was not compiled for."""


def as_time(value: Any) -> float:
    """A time as schedules, tables and calls know it: a number, or a tensor of one, rounded to float32.

    Raises:
        OverflowError: it is beyond float32.
    """
    return struct.unpack("f", struct.pack("f", float(value)))[0]


def as_called(timesteps: Sequence[float], dtype: torch.dtype) -> list[float]:
    """Times of a schedule as they arrive in a model that was captured with times of a dtype, bfloat16 say.

    Where two would be the same, all stay as they are: each has a row of its own.
    """
    exact = torch.tensor(timesteps, dtype=torch.float32)
    called = exact.to(dtype).to(torch.float32) if dtype.is_floating_point else exact
    return (called if len(called.unique()) == len(exact) else exact).tolist()


def buffer_name(tensor: str) -> str:
    """Name of the buffer that holds a tensor of the program: modules do not allow dots."""
    return tensor.replace(".", "__")
