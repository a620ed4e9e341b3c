"""Calls in their one form: every operand of an operation's schema by its name, defaults filled in.

`aten.conv2d.default(%x, @w, None, [1, 1], 1)` and `aten.conv2d.default(input=%x, weight=@w, padding=[1, 1])` are the
same call. Passes read operands by name and never count positions. Python's own operators have no schema: theirs stay
in order.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from tfqc.ir.ops import Operand, signature

_FORMATS = {0: torch.contiguous_format, 1: torch.preserve_format, 2: torch.channels_last}
_DTYPES = {4: torch.int64}  # the only one that a default of an allowed operation is


@functools.cache
def defaults(target: torch._ops.OpOverload) -> Mapping[str, Any]:
    """Values of the operands that a call may leave out, by name."""
    found: dict[str, Any] = {}
    for operand, argument in zip(signature(target), target._schema.arguments, strict=True):
        if operand.needed:
            continue
        value = argument.default_value
        if type(value) is int and operand.kind in ("MemoryFormat", "ScalarType"):
            value = (_FORMATS if operand.kind == "MemoryFormat" else _DTYPES)[value]
        found[operand.name] = value
    return found


def canonical(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands of a call, as `tfqc.ir.schema.check_call` takes them, in their one form."""
    if not isinstance(target, torch._ops.OpOverload):
        return tuple(args), dict(kwargs)
    operands = signature(target)
    positional = (o.name for o in operands if not o.keyword)
    given = {**defaults(target), **dict(zip(positional, args, strict=False)), **kwargs}
    return (), {o.name: _spread(o, given[o.name]) for o in operands if o.name in given}


def is_canonical(node: fx.Node) -> bool:
    """True for an operation whose operands stand as `canonical` gives them."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return not node.args and list(node.kwargs) == [o.name for o in signature(node.target)]


def written(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """Operands as a person would write them: by position as far as they go, then by name; defaults left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return list(node.args), dict(node.kwargs)
    usual = defaults(node.target)
    args: list[Any] = list(node.args)
    kwargs: dict[str, Any] = {}
    left_out = False
    for operand in signature(node.target)[len(args) :]:
        if operand.name not in node.kwargs:
            continue
        value = node.kwargs[operand.name]
        if operand.name in usual and _same(value, usual[operand.name]):
            left_out = True
        elif operand.keyword or left_out:
            kwargs[operand.name] = value
        else:
            args.append(value)
    return args, kwargs


def _spread(operand: Operand, value: Any) -> Any:
    """One value where a list of them is meant, as that list."""
    if operand.repeats and operand.lists == 1 and value is not None and not isinstance(value, (list, tuple)):
        return [value] * operand.repeats
    return list(value) if operand.lists and isinstance(value, tuple) else value


def _same(value: Any, usual: Any) -> bool:
    if isinstance(value, (list, tuple)) or isinstance(usual, (list, tuple)):
        both = isinstance(value, (list, tuple)) and isinstance(usual, (list, tuple)) and len(value) == len(usual)
        return both and all(map(_same, value, usual))
    return type(value) is type(usual) and value == usual
