"""Dimensions that may differ from call to call, as a user says which: `H,W`, or `hidden_states[1]=S:16..4096`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tfqc.errors import CaptureError
from tfqc.ir.program import Input, Role
from tfqc.ir.types import SYMBOL
from tfqc.runtime.sizes import letters

DynamicDims = str | Mapping[str, Mapping[int, str]]

_ITEM = re.compile(
    r"(?:(?P<input>[^\[\]=]+)\[(?P<dim>-?\d+)\]=)?(?P<name>[^=:\[\]]+)(?::(?P<least>\d+)\.\.(?P<most>\d+))?"
)
_FORMS = "H,W for dimensions of the sample, NAME:16..128 with a range, or INPUT[1]=NAME for those of another input"


@dataclass(frozen=True)
class DynamicDim:
    """One of them. input: dotted name, empty = the sample. dim: None = the one that is called like the symbol."""

    name: str
    input: str = ""
    dim: int | None = None
    least: int = 1
    most: int | None = None


def read_dynamic(given: DynamicDims | None) -> list[DynamicDim]:
    """What is asked for, from text or from a mapping: `{"sample": {2: "H:16..128", 3: "W"}}`.

    Raises:
        CaptureError: it says nothing of the kind.
    """
    if isinstance(given, Mapping):
        given = ",".join(f"{path}[{dim}]={name}" for path, dims in given.items() for dim, name in dims.items())
    return [_read(item.strip()) for item in given.split(",")] if given else []


def _read(text: str) -> DynamicDim:
    found = _ITEM.fullmatch(text)
    if found is None:
        raise CaptureError(f"{text[:60]!r} is no dimension that may differ: write {_FORMS}.")
    name, least, most = found["name"], int(found["least"] or 1), int(found["most"]) if found["most"] else None
    if not SYMBOL.fullmatch(name):
        raise CaptureError(f"{name[:60]!r} is no name for a dimension: use capital letters, such as 'H'.")
    if most is not None and not 1 <= least <= most:
        raise CaptureError(f"{text[:60]!r} leaves no size: a range goes from 1 or more up.")
    return DynamicDim(name, found["input"] or "", int(found["dim"]) if found["dim"] else None, least, most)


def places(
    asked: Iterable[DynamicDim], inputs: Iterable[Input], shapes: Mapping[tuple[str, ...], tuple[int, ...]]
) -> dict[tuple[str, ...], dict[int, str]]:
    """The dimensions by place of their input in a call: {dimension: symbol}.

    Args:
        shapes: of the example's tensors.

    Raises:
        CaptureError: there is no such input or dimension, or the example's size is out of the range.
    """
    by_name = {".".join(i.path): i.path for i in inputs}
    sample = next(i.path for i in inputs if i.role is Role.SAMPLE)
    dims: dict[tuple[str, ...], dict[int, str]] = {}
    for item in asked:
        if item.input and item.input not in by_name:
            raise CaptureError(f"There is no input {item.input!r} with dynamic dimensions.")
        path = by_name[item.input] if item.input else sample
        where, shape = ".".join(path), shapes[path]
        rank, dim = len(shape), item.dim
        if dim is None:
            if item.name not in letters(rank)[2:] and not (rank == 3 and item.name == "S"):
                raise CaptureError(
                    f"{where} has no dimension that is called {item.name}: it is {list(shape)} "
                    f"({', '.join(letters(rank))}); write {where}[{rank - 1}]={item.name} for its last one."
                )
            dim = letters(rank).index(item.name)
        if not -rank <= dim < rank:
            raise CaptureError(f"{where} has no dimension {dim}: it is {list(shape)}.")
        size = shape[dim % rank]
        if size < item.least or (item.most is not None and size > item.most):
            raise CaptureError(
                f"{item.name} is {size} in the example inputs, out of {item.least}..{item.most}: give an example "
                "within the range."
            )
        dims.setdefault(path, {})[dim % rank] = item.name
    return dims


def ranges(asked: Iterable[DynamicDim]) -> tuple[str, ...]:
    """What has to hold of sizes, as guards of a program."""
    least = [f"{item.name} >= {item.least}" for item in asked if item.least > 1]
    return (*least, *(f"{item.name} <= {item.most}" for item in asked if item.most is not None))
