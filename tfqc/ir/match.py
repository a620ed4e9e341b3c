"""Recognizing operations: by the operation object, with operands read by name, and patterns over several of them.

    aten = torch.ops.aten
    is_call(node, aten.silu.default)                          # one operation
    linear = Linear.of(node)                                  # a typed view (`tfqc.ir.views`), or None
    found = match(call(aten.add.Tensor, capture("product"), capture("branch", is_branch)), node)

An operation that does not exist, or an operand that its schema has not, is an error where the pattern is written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar, overload

import torch
from torch import fx

from tfqc.ir.ops import signature

T = TypeVar("T")
Target = Any  # an OpOverload, or one of Python's operators


def is_call(value: Any, *targets: Target) -> bool:
    """True for a node that is a call of one of these operations; of any operation, if none is given."""
    return isinstance(value, fx.Node) and value.op == "call_function" and (not targets or value.target in targets)


def item_of(value: Any) -> tuple[fx.Node, int] | None:
    """The operation with several results of which a value is one, and which one; None for any other value."""
    return tuple(value.args) if is_call(value, operator.getitem) else None  # type: ignore[return-value]


def returned_by(graph: fx.Graph) -> Any:
    """What a graph returns: a node, or a structure of nodes."""
    return returned_value(next(node for node in reversed(graph.nodes) if node.op == "output"))


def returned_value(output: fx.Node) -> Any:
    """What a graph's output node gives back."""
    return output.args[0]


def is_stored(value: Any) -> bool:
    """True for a tensor that the program holds."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


class operand(Generic[T]):
    """An operand of a `View`, by its name in the schema (the attribute's own name unless another is given)."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __set_name__(self, owner: type[View], name: str) -> None:
        self.name = self.name or name
        for target in owner.targets:
            if self.name not in {o.name for o in signature(target)}:
                raise TypeError(f"{target} has no operand {self.name!r}")

    @overload
    def __get__(self, view: None, owner: type[View]) -> Self: ...
    @overload
    def __get__(self, view: View, owner: type[View]) -> T: ...
    def __get__(self, view: View | None, owner: type[View]) -> T | Self:
        return self if view is None else view.node.kwargs[self.name]  # type: ignore[return-value]


V = TypeVar("V", bound="View")


@dataclass(frozen=True)
class View:
    """A call of one of `targets`, its operands as attributes."""

    targets: ClassVar[tuple[torch._ops.OpOverload, ...]] = ()
    node: fx.Node

    @classmethod
    def of(cls: type[V], value: Any) -> V | None:
        """The view of a node that is such a call; None for whatever is none."""
        return cls(value) if is_call(value, *cls.targets) else None

    @property
    def target(self) -> Any:
        """The operation."""
        return self.node.target


# -- patterns ----------------------------------------------------------------------------------------------------------

Found = dict[str, Any]


@dataclass(frozen=True)
class Capture:
    """Anything that fulfils `where`, kept under a name."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Call:
    """A call of one of `targets` whose operands match; what `operands` does not name may be anything.

    once: nothing else reads the value. commutes: `self` and `other` may stand in either order.
    """

    targets: tuple[Target, ...]
    operands: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    once: bool = False
    commutes: bool = False


def capture(name: str, where: Callable[[Any], bool] | None = None) -> Capture:
    """Any value, under a name; the same value wherever a pattern has the name."""
    return Capture(name, where)


def call(*targets: Target, name: str = "", once: bool = False, commutes: bool = False, **operands: Any) -> Call:
    """A call of one of the operations, its operands as patterns or as the values that they have to be."""
    for target in targets:
        names = {o.name for o in signature(target)} if isinstance(target, torch._ops.OpOverload) else set[str]()
        if commutes and not {"self", "other"} <= names:
            raise TypeError(f"{target} has no operands `self` and `other`, which could stand in either order")
        if strange := sorted(operands.keys() - names):
            raise TypeError(f"{target} has no operand {strange[0]!r}")
    return Call(targets, operands, name, once, commutes)


def match(pattern: Any, value: Any) -> Iterator[Found]:
    """Each way in which a value matches: what the pattern's names stand for."""
    match pattern:
        case Capture(name=name, where=where):
            if where is None or where(value):
                yield {name: value}
        case Call():
            if is_call(value, *pattern.targets) and (not pattern.once or read_once(value)):
                own = {pattern.name: value} if pattern.name else {}
                for given in _orders(pattern, value):
                    for found in _all(list(pattern.operands.items()), given):
                        if (both := _joined(own, found)) is not None:
                            yield both
        case _:
            if type(pattern) is type(value) and pattern == value:
                yield {}


def read_once(node: fx.Node) -> bool:
    """True for a value that one operation reads, and reads once."""
    return only_reader(node) is not None


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one operation that reads a value, if it reads it once."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    reads: list[fx.Node] = []
    fx.map_arg((reader.args, reader.kwargs), reads.append)
    return reader if reads.count(node) == 1 and reader.op == "call_function" else None


def _orders(pattern: Call, node: fx.Node) -> Iterator[Mapping[str, Any]]:
    yield node.kwargs
    if pattern.commutes:
        yield {**node.kwargs, "self": node.kwargs["other"], "other": node.kwargs["self"]}


def _all(patterns: list[tuple[str, Any]], given: Mapping[str, Any]) -> Iterator[Found]:
    """Each way in which all operands match at once."""
    if not patterns:
        yield {}
        return
    (name, first), *rest = patterns
    for found in match(first, given[name]):
        for others in _all(rest, given):
            if (both := _joined(found, others)) is not None:
                yield both


def _joined(a: Found, b: Found) -> Found | None:
    """Both together; None where one name would stand for two values."""
    return None if any(a[name] is not b[name] for name in a.keys() & b.keys()) else a | b
