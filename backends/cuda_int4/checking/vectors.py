"""Stored test vectors: small problems for every kind of kernel, and what numpy says that they come to.

`vectors.safetensors` holds them: metadata describe the kernels, tensors are named `<kernel>/<argument>`, those that the
kernel writes `<kernel>/<argument>=`. `python -m tests.cuda.vectors` makes the file, and the tests execute the same
numbers in the interpreter of PTX. Arguments that a kernel does not need are not stored: they are null.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Kernel, Quantize, Tile, Window

Array = NDArray[Any]
FILE = Path(__file__).with_name("vectors.safetensors")

_KINDS: dict[str, type[Gemm | Quantize]] = {"gemm": Gemm, "quantize": Quantize}
_PARTS = {"epilogue": Epilogue, "tile": Tile, "window": Window}
_KEY = "vectors"  # the only one: safetensors writes several in any order


@dataclass(frozen=True)
class Tolerance:
    """How far what a kernel writes may be off, value by value; nothing at all by default.

    steps: units in the last place of f16, or codes. share: of the values that may be off at all. slack: a difference
    that is none, for f16 that are small since larger numbers have cancelled.
    """

    steps: int = 0
    share: float = 1.0
    slack: float = 0.0


@dataclass(frozen=True)
class Vector:
    """A kernel, its rows, its arguments by name, and what it has to write."""

    kernel: Kernel
    rows: int
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    tolerance: Tolerance = field(default=Tolerance())

    def difference(self, got: Mapping[str, Array]) -> Difference:
        """Between what a kernel has written, by argument, and what it has to."""
        every = [
            self._difference(self._values(name, got[name]), self._values(name, self.outputs[name])) for name in got
        ]
        return Difference(
            sum(each.differing for each in every),
            sum(each.of for each in every),
            max(each.most for each in every),
            all(each.passed for each in every),
        )

    def _values(self, name: str, array: Array) -> Array:
        """One number for each value of an output."""
        if isinstance(self.kernel, Quantize):
            packed = name == "out" and self.kernel.bits == 4
        else:
            packed = self.kernel.epilogue.out == "u4"
        return np.stack([array & 15, array >> 4], -1) if packed else array

    def _difference(self, got: Array, want: Array) -> Difference:
        off = np.abs(_countable(got) - _countable(want))
        if self.tolerance.slack:
            off[np.abs(got.astype(np.float64) - want) <= self.tolerance.slack] = 0
        differing, most = int(np.count_nonzero(off)), int(off.max())
        passed = most <= self.tolerance.steps and differing <= self.tolerance.share * off.size
        return Difference(differing, off.size, most, passed)


@dataclass(frozen=True)
class Difference:
    """How many of the values differ, by how many steps at most, and whether that is tolerated."""

    differing: int
    of: int
    most: int
    passed: bool


def load() -> list[Vector]:
    """The vectors that ship with tfqc."""
    with safe_open(FILE, "numpy") as file:
        told: list[dict[str, Any]] = json.loads(file.metadata()[_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    found: list[Vector] = []
    for each in told:
        kernel = kernel_of(each["kernel"])
        own = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(f"{kernel.name}/")}
        inputs = {name: value for name, value in own.items() if not name.endswith("=")}
        outputs = {name.removesuffix("="): value for name, value in own.items() if name.endswith("=")}
        found.append(Vector(kernel, each["rows"], inputs, outputs, Tolerance(**each.get("tolerance", {}))))
    return found


def to_bytes(vectors: Iterable[Vector]) -> bytes:
    """The file of vectors; the same bytes for the same ones."""
    tensors: dict[str, Array] = {}
    told: list[dict[str, Any]] = []
    for vector in vectors:
        name = vector.kernel.name
        tensors |= {f"{name}/{argument}": value for argument, value in vector.inputs.items()}
        tensors |= {f"{name}/{argument}=": value for argument, value in vector.outputs.items()}
        each = {"kernel": described(vector.kernel), "rows": vector.rows, "tolerance": _changed(vector.tolerance)}
        told.append({key: value for key, value in each.items() if value != {}})
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, {_KEY: json.dumps(told)})


def described(kernel: Kernel) -> dict[str, Any]:
    """A kernel as JSON: what differs from the defaults, so that later options leave it as it is."""
    (kind,) = (name for name, cls in _KINDS.items() if isinstance(kernel, cls))
    return {"kind": kind, **_changed(kernel)}


def kernel_of(told: Mapping[str, Any]) -> Kernel:
    """The inverse of `described`."""
    fields = {name: _PARTS[name](**value) if name in _PARTS else value for name, value in told.items()}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return _KINDS[fields.pop("kind")](**fields)


def _changed(thing: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in dataclasses.fields(thing):
        value = getattr(thing, each.name)
        if value != each.default:
            found[each.name] = _changed(value) if dataclasses.is_dataclass(value) else value
    return found


def _countable(values: Array) -> Array:
    """Integers as they are; floats as integers that count them: neighbours are 1 apart, both zeros are 0."""
    if values.dtype.kind != "f":
        return values.astype(np.int64)
    bits = values.view(f"i{values.itemsize}").astype(np.int64)
    return np.where(bits < 0, -(bits & (2 ** (8 * values.itemsize - 1) - 1)), bits)
