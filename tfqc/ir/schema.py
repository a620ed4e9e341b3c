"""Whether the operands of a call are of the kinds that its operation takes: how many, which keywords, what each is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError
from tfqc.ir.aten import DETERMINISTIC
from tfqc.ir.ops import PYTHON, Operand, op_name, signature
from tfqc.ir.types import ScalarType, TensorType, TupleType, Type

Types = Mapping[str, Type]


def check_call(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], types: Types) -> None:
    """Refuse a call that torch would refuse for the kinds of its operands, whatever their shapes are.

    Raises:
        IRError: too many or too few operands, an unknown keyword, or an operand of another kind.
    """
    problem = _of_overload if isinstance(target, torch._ops.OpOverload) else _of_python
    if reason := next(problem(target, args, kwargs, types), None):
        raise IRError(f"{op_name(target)} {reason}.")


def _of_python(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], types: Types) -> Iterator[str]:
    kinds = PYTHON[op_name(target)][1]
    if kwargs or len(args) != len(kinds):
        yield f"takes {len(kinds)} operands and no keywords"
        return
    for place, (kind, value) in enumerate(zip(kinds, args, strict=True), 1):
        match kind:
            case "t":
                fits = isinstance(value, fx.Node) and isinstance(types.get(value.name), TupleType)
            case "i":
                several = types.get(args[0].name)
                size = len(several.items) if isinstance(several, TupleType) else 0
                fits = type(value) is int and -size <= value < size
            case "b":
                fits = _is(value, types, (bool,), "bool")
            case _:
                fits = _is(value, types, (int, float), "int", "float", "bool")
        if not fits:
            yield f"cannot take {_said(value, types)} as operand {place}"


def _of_overload(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], types: Types) -> Iterator[str]:
    operands = signature(target)
    positional = [o for o in operands if not o.keyword]
    if len(args) > len(positional):
        yield f"takes {len(positional)} operands, not {len(args)}"
        return
    given = dict(zip((o.name for o in positional), args, strict=False))
    if twice := sorted(given.keys() & kwargs.keys()):
        yield f"is given {twice[0]!r} twice"
    given.update(kwargs)
    if len(given) > sum(o.name in given for o in operands):
        yield f"has no operand {sorted(given.keys() - {o.name for o in operands})[0]!r}"
    for operand in operands:
        if operand.name not in given:
            if operand.needed:
                yield f"needs its operand {operand.name!r}"
        elif not _fits(given[operand.name], operand, types):
            yield f"cannot take {_said(given[operand.name], types)} as {operand.name!r}, which is {operand.type}"
    packet = target._overloadpacket.__name__.removesuffix("_")
    for name, wanted in DETERMINISTIC.get(packet, {}).items() if target.namespace == "aten" else ():
        if given.get(name, wanted) != wanted:
            yield f"would draw random numbers: {name} has to be {wanted}"


def _fits(value: Any, operand: Operand, types: Types) -> bool:
    if value is None:
        return operand.optional
    if operand.lists == 1 and operand.repeats and _one(value, operand.kind, types):
        return True
    return _nested(value, operand, operand.lists, types)


def _nested(value: Any, operand: Operand, lists: int, types: Types) -> bool:
    if not lists:
        if value is None:
            return operand.holes
        numbers = operand.numbers and not operand.lists and operand.kind == "Tensor"
        return _one(value, operand.kind, types) or (numbers and _is(value, types, (int, float), "int", "float"))
    if isinstance(value, fx.Node):  # what `chunk` and `split` return may be passed on whole
        return operand.kind == "Tensor" and isinstance(types.get(value.name), TupleType)
    return isinstance(value, (list, tuple)) and all(_nested(v, operand, lists - 1, types) for v in value)


_LITERALS: dict[str, tuple[type, ...]] = {
    "int": (int,), "SymInt": (int,), "float": (int, float), "number": (int, float), "bool": (bool,), "str": (str,),
    "ScalarType": (torch.dtype,), "Layout": (torch.layout,), "Device": (torch.device,),
    "MemoryFormat": (torch.memory_format,),
}  # fmt: skip
_SCALARS = {
    "int": ("int",), "SymInt": ("int",), "float": ("float", "int"), "number": ("float", "int", "bool"),
    "bool": ("bool",),
}  # fmt: skip


def _one(value: Any, kind: str, types: Types) -> bool:
    if kind == "Tensor":
        return isinstance(value, fx.Node) and isinstance(types.get(value.name), TensorType)
    return _is(value, types, _LITERALS[kind], *_SCALARS.get(kind, ()))


def _is(value: Any, types: Types, literals: tuple[type, ...], *scalars: str) -> bool:
    if isinstance(value, fx.Node):
        type_ = types.get(value.name)
        return isinstance(type_, ScalarType) and type_.kind in scalars
    return isinstance(value, literals)


def _said(value: Any, types: Types) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}: {types.get(value.name)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
