"""What a model returns: its tensors, and the structure in which they were, as data.

A structure is JSON: `["tensor", 0]` is the first of the tensors that the step returns, `["rows", 0]` a list of its
rows, one for each image; `["value", 1.5]` a constant;
`["tuple", [...]]` and `["list", [...]]` hold structures, `["dict", [[key, ...], ...]]` and
`["fields", "module:class", [[name, ...], ...]]` named ones. An artifact names a class and does not bring it: a class is
used if the process has loaded it already and it has these fields, and none of its code runs to make the result. Without
it the result is an `Output` with the same fields.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Structure = Sequence[Any]
_VALUES = (bool, int, float, str, type(None))
DEEPEST = 16


class Output(tuple[Any, ...]):
    """The model's outputs as a tuple; `.sample` is the first, as in the outputs of diffusers.

    Where they had names (`fields`), they have them here: `output.name`, `output["name"]`. A pytree of torch.
    """

    fields: tuple[str, ...]

    def __new__(cls, values: Iterable[Any] = (), fields: Iterable[str] = ()) -> Output:
        made = super().__new__(cls, values)
        made.fields = tuple(fields)
        return made

    def __getattr__(self, name: str) -> Any:
        if name != "fields" and name in self.fields:
            return self[self.fields.index(name)]
        if name == "sample":
            return self[0]
        raise AttributeError(f"The output has no {name!r}.")

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)


pytree.register_pytree_node(
    Output,
    lambda output: (list(output), output.fields),
    lambda values, fields: Output(values, fields or ()),
    serialized_type_name="tfqc.runtime.Output",
)


class EachImage(list[Any]):
    """A list with a tensor for each image, as a model returns it: rows of one tensor."""


def taken_apart(output: Any) -> tuple[list[tuple[tuple[str, ...], Tensor]], Structure]:
    """The tensors of an output, each with its place in it, and the structure.

    Raises:
        TypeError: it holds something else than tensors, numbers, texts and None, in what it says.
    """
    tensors: list[tuple[tuple[str, ...], Tensor]] = []

    def walk(value: Any, path: tuple[str, ...]) -> Structure:
        if isinstance(value, Tensor):
            tensors.append((path, value))
            return ["tensor", len(tensors) - 1]
        if isinstance(value, EachImage):
            tensors.append((path, torch.stack(value)))
            return ["rows", len(tensors) - 1]
        if isinstance(value, _VALUES):
            return ["value", value]
        if len(path) < DEEPEST:
            if named := _named(value):
                kind = f"{type(value).__module__}:{type(value).__qualname__}"
                return ["fields", kind, [[name, walk(item, (*path, name))] for name, item in named]]
            if isinstance(value, Mapping) and all(isinstance(k, (str, int)) for k in value):
                return ["dict", [[key, walk(item, (*path, str(key)))] for key, item in value.items()]]
            if isinstance(value, (list, tuple)):
                kind = "list" if isinstance(value, list) else "tuple"
                return [kind, [walk(item, (*path, str(i))) for i, item in enumerate(value)]]
        what = repr(".".join(path)) if path else "it"
        raise TypeError(f"{what} is a {type(value).__name__}")

    structure = walk(output, ())
    return tensors, structure


def put_together(structure: Structure, tensors: Sequence[Any]) -> Any:
    """Inverse of `taken_apart`."""
    match structure:
        case ["tensor", int(number)]:
            return tensors[number]
        case ["rows", int(number)]:
            return list(tensors[number])
        case ["value", value]:
            return value
        case ["tuple", parts]:
            return tuple(put_together(part, tensors) for part in parts)
        case ["list", parts]:
            return [put_together(part, tensors) for part in parts]
        case ["dict", parts]:
            return {key: put_together(part, tensors) for key, part in parts}
        case ["fields", str(kind), parts]:
            values = {name: put_together(part, tensors) for name, part in parts}
            found = _loaded(kind, tuple(values))
            return Output(values.values(), values) if found is None else _made(found, values)
        case _:
            raise ValueError(f"{structure!r:.80} is no structure of outputs.")


def renumbered(structure: Structure, numbers: Mapping[int, int]) -> Structure:
    """The same structure around tensors in another order."""
    kind, *rest = structure
    match kind:
        case "tensor" | "rows":
            return [kind, numbers[rest[0]]]
        case "tuple" | "list":
            return [kind, [renumbered(part, numbers) for part in rest[0]]]
        case "dict" | "fields":
            return [kind, *rest[:-1], [[name, renumbered(part, numbers)] for name, part in rest[-1]]]
        case _:
            return structure


def check_structure(structure: Any, depth: int = 0) -> Iterator[int]:
    """Numbers of the tensors that stand in a structure, in order.

    Raises:
        ValueError: it is none.
    """
    match structure:
        case ["tensor" | "rows", int(number)] if type(number) is int and number >= 0:
            yield number
        case ["value", value] if isinstance(value, _VALUES):
            pass
        case ["tuple" | "list", list(parts)] if depth < DEEPEST:
            for part in parts:
                yield from check_structure(part, depth + 1)
        case ["dict", list(parts)] | ["fields", str(), list(parts)] if depth < DEEPEST:
            kinds = (str, int) if structure[0] == "dict" else (str,)
            if not all(isinstance(part, list) and len(part) == 2 and type(part[0]) in kinds for part in parts):
                raise ValueError(f"{structure!r:.80} names no outputs.")
            for _, part in parts:
                yield from check_structure(part, depth + 1)
        case _:
            raise ValueError(f"{structure!r:.80} is no structure of outputs.")


def prediction_at(places: Sequence[tuple[str, ...]], shapes: Sequence[Any], sample: Any) -> int:
    """Which of several tensors is what the model predicts of the sample: the one that is called so, else the first of
    the sample's shape, else the first."""
    if named := [i for i, place in enumerate(places) if place[-1:] == ("sample",)]:
        return named[0]
    return next((i for i, shape in enumerate(shapes) if tuple(shape) == tuple(sample)), 0)


def prediction_of(output: Any, sample: Tensor) -> Tensor:
    """What a model predicts of the sample, from whatever it returned.

    Raises:
        TypeError: there is no tensor in it.
    """
    named = getattr(output, "sample", None)
    if isinstance(named, Tensor):
        return named
    tensors, _ = taken_apart(output)
    if not tensors:
        raise TypeError(f"The model returns no tensor, but a {type(output).__name__}.")
    if len(tensors) == len(sample) and all(tensor.shape == sample.shape[1:] for _, tensor in tensors):
        return torch.stack([tensor for _, tensor in tensors])  # a list of images
    places, values = zip(*tensors, strict=True)
    return values[prediction_at(places, [v.shape for v in values], sample.shape)]


def _named(value: Any) -> list[tuple[str, Any]]:
    """Fields of a dataclass or a named tuple; nothing for other values."""
    if isinstance(value, Output):
        return [(name, value[name]) for name in value.fields]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return list(zip(_fields(type(value)), value, strict=False)) if isinstance(value, tuple) else []


def _fields(kind: type) -> tuple[str, ...]:
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(getattr(kind, "_fields", ())) if issubclass(kind, tuple) else ()


def _loaded(name: str, fields: tuple[str, ...]) -> type | None:
    """The class of that name, with those fields, if it is loaded: nothing is imported, no attribute computed."""
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = vars(found).get(part) if hasattr(found, "__dict__") else None
    if not isinstance(found, type) or (found.__module__, found.__qualname__) != (module, qualified):
        return None
    return found if _fields(found) == fields else None


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    """An instance with fields set, its own code not run."""
    if issubclass(kind, tuple):
        return tuple.__new__(kind, values.values())
    if not issubclass(kind, OrderedDict):
        made = object.__new__(kind)
    else:  # the outputs of diffusers and transformers are dictionaries of what is not None, too
        made = cast(Any, OrderedDict.__new__(kind))
        for name, value in values.items():
            if value is not None:
                OrderedDict.__setitem__(made, name, value)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
