"""The operations that a program may hold, ATen's, ours, Python's and those of plug-ins, and their names.

IR text comes from strangers, so a name is looked up in lists and never as an attribute. A plug-in adds its own:

    library = torch.library.Library("acme", "DEF")  # then define and implement "scale" in it
    tfqc.ir.ops.register(torch.ops.acme.scale.default)

in the module of its pass or backend, which is loaded when text names an operation that nothing has registered yet.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError, suggest
from tfqc.ir.aten import ASSERTIONS, FUNCTIONAL, ZEROED
from tfqc.runtime import kernel_ops, ops

DEFINED = (ops, kernel_ops)  # which registers the operations that the IR names tfqc.*

# Operations that read only the shape of their first argument, never its values.
aten = torch.ops.aten
SHAPE_ONLY = frozenset({
    aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int, aten.zeros_like.default, aten.ones_like.default,
    aten.empty_like.default, aten.full_like.default, aten.new_zeros.default, aten.new_ones.default,
    aten.new_full.default, aten.new_empty.default,
})  # fmt: skip

# What torch.export leaves of arithmetic on sizes, and the operands of each: n a number, b a bool, t several values,
# i the place of one of them.
PYTHON: dict[str, tuple[Callable[..., Any], str]] = {
    "operator.getitem": (operator.getitem, "ti"),
    **{f"operator.{f.__name__}": (f, "nn") for f in (
        operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.pow,
        operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    )},
    **{f"operator.{f.__name__}": (f, "n") for f in (operator.neg, operator.pos, operator.abs)},
    **{f"operator.{f.__name__}": (f, "bb") for f in (operator.and_, operator.or_)},
    "operator.not_": (operator.not_, "b"),
    **{f"math.{f.__name__}": (f, "n") for f in (math.floor, math.ceil, math.trunc, math.sqrt)},
    "torch.sym_float": (torch.sym_float, "n"), "torch.sym_int": (torch.sym_int, "n"),
    "torch.sym_max": (torch.sym_max, "nn"), "torch.sym_min": (torch.sym_min, "nn"),
    "torch.sym_not": (torch.sym_not, "b"), "torch.sym_ite": (torch.sym_ite, "bnn"),
}  # fmt: skip
_PYTHON_NAMES = {function: name for name, (function, _) in PYTHON.items()}

# What an operand or a result may be; the rest (generators, storages, streams, classes) is no data.
_DATA = {"Tensor", "int", "SymInt", "float", "bool", "number", "str", "ScalarType", "Layout", "Device", "MemoryFormat"}

_OURS = frozenset(
    name.replace("::", ".") for name in torch._C._dispatch_get_all_op_names() if name.startswith("tfqc::")
)
_REGISTERED: dict[str, torch._ops.OpOverload] = {}


def register(target: torch._ops.OpOverload) -> None:
    """Let programs hold an operation of a plug-in: `torch.ops.<namespace>.<name>.<overload>`.

    It has to give the same for the same operands, change none of them, and run on the meta device, where its types
    are inferred.

    Raises:
        IRError: the namespace is tfqc's or torch's, or the operation takes or gives what is no data.
    """
    name = str(target)
    if target.namespace in ("aten", "prim", "prims", "tfqc"):
        raise IRError(f"{name} cannot be registered: an overload of a plug-in's own torch.library namespace can.")
    if reason := _unfit(target):
        raise IRError(f"{name} cannot be registered: {reason}.")
    _REGISTERED[name] = target


def works_in_place(target: Any) -> bool:
    """True for an operation that changes an operand, so that it matters even if nothing reads its result."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_of_capture(target: Any) -> bool:
    """True for what only captured programs hold: operations in place, and assertions, which have no value."""
    return works_in_place(target) or is_assertion(target)


def is_assertion(target: Any) -> bool:
    """True for an operation that only checks something and has no value."""
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and target._overloadpacket.__name__ in ASSERTIONS
    )


# Views that ATen may also answer with a copy; behind kernels they never need one.
_VIEWS = frozenset({aten.reshape.default, aten.flatten.using_ints, operator.getitem})


def is_view(node: fx.Node) -> bool:
    """True for an operation whose result lies in the memory of its first operand."""
    if node.op != "call_function" or node.target in _VIEWS:
        return node.op == "call_function"
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def op_name(target: Any) -> str:
    """The name that the IR text gives an operation: `aten.linear.default`, `operator.getitem`, `math.floor`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if (name := _PYTHON_NAMES.get(target)) is not None:
        return name
    raise IRError(f"{target!r} is not an operation that the IR knows: only ATen, tfqc and Python operators are.")


@functools.cache
def _known(name: str) -> Any:
    """The operation of a name that tfqc itself allows; an IRError says why it is none."""
    head, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if name in PYTHON:
        return PYTHON[name][0]
    if head == "aten":
        rest = ZEROED.get(rest, rest)
        packet, _, overload = rest.partition(".")
        functional = packet if packet in FUNCTIONAL or packet in ASSERTIONS else packet.removesuffix("_")
        if functional in FUNCTIONAL or functional in ASSERTIONS:
            return _overload(getattr(torch.ops.aten, packet, None), overload, name, in_place=packet != functional)
        close = suggest(packet[:40], sorted(FUNCTIONAL))
        advice = close if close.startswith(" Did") else ""
        raise IRError(f"No operation {name[:80]!r} is allowed in a program.{advice}")
    if head == "tfqc" and f"tfqc.{packet}" in _OURS:
        return _overload(getattr(torch.ops.tfqc, packet), overload, name, in_place=False)
    raise IRError(f"No operation {name[:80]!r} is allowed in a program.")


def _overload(packet: Any, overload: str, name: str, *, in_place: bool) -> Any:
    if packet is None or (overload or "default") not in packet.overloads():
        raise IRError(f"No operation {name[:80]!r} exists.")
    found = getattr(packet, overload or "default")
    if reason := _unfit(found, in_place=in_place):
        raise IRError(f"{name} is not allowed in a program: {reason}.")
    return found


def op_by_name(name: str) -> Any:
    """The operation that a program may hold under this name: inverse of `op_name`.

    Of `aten.empty` and its like, which read memory that nobody wrote, it gives the one that reads zeros.

    Raises:
        IRError: there is none, or it is not one that programs may hold.
    """
    head = name.partition(".")[0]
    if name in _REGISTERED:
        return _REGISTERED[name]
    if head in ("aten", "tfqc", "operator", "math", "torch"):
        return _known(name)
    from tfqc.registry import load_plugins

    broken = load_plugins()
    if name in _REGISTERED:
        return _REGISTERED[name]
    raise IRError(
        f"No operation {name[:80]!r} is known: install the plug-in that registers operations of {head[:40]!r}.",
        *broken,
    )


def _unfit(target: torch._ops.OpOverload, *, in_place: bool = False) -> str:
    """Why programs may not hold an overload; empty if they may."""
    schema = target._schema
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and not (in_place and written == [schema.arguments[0].name]):
        return f"it writes to its operand {written[0]!r}"
    for item in (*schema.arguments, *schema.returns):
        if _kind(item)[0] not in _DATA:
            return f"it takes or gives a {item.real_type}, which is no data"
    return ""


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of a schema: the kind of one value, and in how many lists values lie.

    `optional` says that None will do in its place, `holes` that None will do for a value in the list. `repeats`: one
    value will do for a list of so many; 0 where none will. `numbers`: a number will do for a tensor.
    """

    name: str
    type: str
    kind: str
    lists: int
    optional: bool
    holes: bool
    repeats: int
    numbers: bool
    keyword: bool
    needed: bool


@functools.cache
def signature(target: torch._ops.OpOverload) -> tuple[Operand, ...]:
    """The operands that an overload takes, in order."""
    numbers = torch._C._should_allow_numbers_as_tensors(target._overloadpacket.__name__)
    found: list[Operand] = []
    for a in target._schema.arguments:
        repeats = getattr(a, "N", None) or 0
        found.append(
            Operand(a.name, str(a.real_type), *_kind(a), repeats, numbers, a.kwarg_only, not a.has_default_value())
        )
    return tuple(found)


def _kind(argument: Any) -> tuple[str, int, bool, bool]:
    """Of an argument in a schema: `kind`, `lists`, `optional` and `holes` of its `Operand`."""
    text, lists, optional, holes = str(argument.real_type), 0, False, False
    while "[" in text:
        wrapper, _, text = text.partition("[")
        text = text.removesuffix("]")
        lists += wrapper == "List"
        if wrapper == "Optional":
            optional, holes = optional or not lists, holes or lists > 0
    return text, lists, optional, holes
