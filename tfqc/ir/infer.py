"""Types of operations, by running them on the meta device in several worlds: with other values of the symbols.

A dimension of the result is what agrees with its value in every world: a number, a dimension of an operand, or a
polynomial in the symbols.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import IRError
from tfqc.ir.data import ProgramData
from tfqc.ir.dims import MAX
from tfqc.ir.ops import PYTHON, op_name
from tfqc.ir.polynomial import fitted
from tfqc.ir.types import Dim, ScalarType, TensorType, TupleType, Type, evaluate, symbols_of
from tfqc.ir.worlds import World, more_worlds, worlds_of

# What an operation gives in one world: (dtype, sizes) of a tensor, a number, or several of these.
Seen = Any
_MOST_VALUES = 4096  # that one operation may give, as `unbind` and `split` give them


@dataclass(frozen=True)
class _Number:
    """A number that differs from an equal one of another type: adding 1.0 to integers gives other than adding 1."""

    type: type
    value: float


@dataclass(frozen=True)
class _Numbers:
    """A number that an operation on sizes gives, in each world."""

    values: tuple[_Number, ...]


Memo = dict[fx.Node, tuple[Seen, ...]]  # what operations on sizes give, which other ones read


def infer_type(program: ProgramData, node: fx.Node) -> Type:
    """The type of a `call_function` node from its operands' types.

    Raises:
        IRError: the operation refuses such operands, or a dimension is no polynomial in the symbols.
    """
    operands = [program.types[n.name] for n in node.all_input_nodes]
    own = [program.types[node.name]] if node.name in program.types else []  # of what it was before it was rewritten
    symbols = sorted({s for type_ in operands for s in symbols_of(type_)})
    known = {d for type_ in (*operands, *own) for d in _dims(type_) if isinstance(d, str)}
    worlds = worlds_of(program, rows_apart=True)
    seen = _seen(program, node, worlds)
    expressions: dict[tuple[int, ...], str] = {}
    for expression in sorted(known, key=lambda e: (len(e), e), reverse=True):
        if symbols_of(ScalarType("int", expression)) <= set(program.symbols):
            expressions[tuple(evaluate(expression, dict(w)) for w in worlds)] = expression

    def dim(values: tuple[int, ...], path: tuple[int, ...]) -> Dim:
        if len(set(values)) == 1:
            return values[0]
        if values in expressions:
            return expressions[values]
        wider = more_worlds(program, symbols)
        further = [_at(result, path) for result in _seen(program, node, wider)]
        found = fitted(symbols, [dict(w) for w in wider], further)
        if found and all(evaluate(found, dict(w)) == v for w, v in zip(worlds, values, strict=True)):
            return found
        raise IRError(f"The shape of %{node.name} = {op_name(node.target)}(...) follows {symbols} in no simple way.")

    def unify(outs: Sequence[Seen], path: tuple[int, ...]) -> Type:
        match outs[0]:
            case (torch.dtype() as dtype, tuple() as sizes):
                ranks = range(len(sizes))
                return TensorType(dtype, tuple(dim(tuple(o[1][i] for o in outs), (*path, 1, i)) for i in ranks))
            case tuple() as items:
                if len({len(o) for o in outs}) > 1:
                    raise IRError(
                        f"%{node.name} = {op_name(node.target)}(...) gives more or fewer values by {symbols}."
                    )
                return TupleType(tuple(unify([o[i] for o in outs], (*path, i)) for i in range(len(items))))
            case bool() | None as value:
                return ScalarType("none" if value is None else "bool")
            case int():
                return ScalarType("int", str(dim(tuple(outs), path)))
            case value:
                return ScalarType(type(value).__name__)

    return unify(seen, ())


def mistyped(program: ProgramData, node: fx.Node, memo: Memo) -> str:
    """What the declared type of a `call_function` node differs in from what its operation gives; empty if in nothing.

    Dimensions are compared by value, in every world.

    Raises:
        IRError: the operation refuses its operands.
    """
    declared = program.types[node.name]
    worlds = worlds_of(program)
    if _agrees(declared, _seen(program, node, worlds, memo), worlds):
        return ""
    try:
        return f"is declared {declared}, but {op_name(node.target)} gives {infer_type(program, node)} there"
    except IRError:
        return f"is declared {declared}, but {op_name(node.target)} gives another type there"


def _agrees(type_: Type, seen: tuple[Seen, ...], worlds: tuple[World, ...]) -> bool:
    match type_:
        case TensorType(dtype=dtype, shape=shape):
            return all(
                isinstance(got, tuple) and got[:1] == (dtype,) and got[1] == _sizes(shape, world)
                for got, world in zip(seen, worlds, strict=True)
            )
        case TupleType(items=items):
            return all(isinstance(s, tuple) and len(s) == len(items) for s in seen) and all(
                _agrees(item, tuple(s[i] for s in seen), worlds) for i, item in enumerate(items)
            )
        case ScalarType(kind="none"):
            return all(s is None for s in seen)
        case ScalarType(kind="int", value=str() as value):
            return all(type(s) is int and s == _size(value, world) for s, world in zip(seen, worlds, strict=True))
        case ScalarType(kind=kind):
            return all(type(s).__name__ == kind for s in seen)


def _at(result: Seen, path: tuple[int, ...]) -> int:
    for place in path:
        result = result[place]
    return result


def _dims(type_: Type) -> list[Dim]:
    match type_:
        case TensorType(shape=shape):
            return list(shape)
        case ScalarType(value=str() as value):
            return [value]
        case TupleType(items=items):
            return [d for item in items for d in _dims(item)]
        case _:
            return []


@functools.lru_cache(maxsize=65536)
def _size(dim: Dim, world: World) -> int:
    return evaluate(dim, dict(world))


@functools.lru_cache(maxsize=16384)
def _sizes(shape: tuple[Dim, ...], world: World) -> tuple[int, ...]:
    return tuple(_size(d, world) for d in shape)


# -- running -----------------------------------------------------------------------------------------------------------


def _seen(program: ProgramData, node: fx.Node, worlds: tuple[World, ...], memo: Memo | None = None) -> tuple[Seen, ...]:
    """What the operation gives in each world: models repeat the same operation on the same types many times."""
    memo = {} if memo is None else memo
    if node in memo:
        return memo[node]
    try:
        args, kwargs = _frozen(program, node.args, worlds, memo), _frozen(program, dict(node.kwargs), worlds, memo)
        try:
            seen = _outputs(node.target, args, kwargs, worlds)
        except TypeError:  # an argument, such as a slice, has no hash
            seen = _outputs.__wrapped__(node.target, args, kwargs, worlds)
    except Exception as error:
        types = ", ".join(f"%{n.name}: {program.types[n.name]}" for n in node.all_input_nodes)
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise IRError(f"{op_name(node.target)} refuses its operands ({types}): {reason}") from error
    if node.target in _COMPUTED:
        memo[node] = seen
    return seen


@functools.lru_cache(maxsize=16384)
def _outputs(target: Any, args: Any, kwargs: Any, worlds: tuple[World, ...]) -> tuple[Seen, ...]:
    found: list[Seen] = []
    for number, world in enumerate(worlds):
        positional = _example(args, world, number)
        named = {k: _example(v, world, number) for k, v in kwargs}
        if isinstance(target, torch._ops.OpOverload):
            if any(a.name == "device" for a in target._schema.arguments if a.kwarg_only):
                named["device"] = torch.device("meta")  # what it makes is made nowhere
            _check_count(target, positional, named)
        elif target is operator.pow and abs(positional[1]) > 64:
            raise IRError(f"a power of {positional[1]} is none of sizes")
        found.append(_shape_of(target(*positional, **named)))
    return tuple(found)


def _check_count(target: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse operations that would give millions of values: only their sizes and numbers say how many."""
    names = [a.name for a in target._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    value, dim = given.get("self"), given.get("dim", 0)
    packet = target._overloadpacket.__name__
    if not isinstance(value, Tensor) or not any(str(r.real_type) == "List[Tensor]" for r in target._schema.returns):
        return
    extent = value.shape[dim] if isinstance(dim, int) and -value.dim() <= dim < value.dim() else 0
    count = {
        "unbind": extent,
        "split": -(-extent // max(given.get("split_size", 1), 1)) if isinstance(given.get("split_size"), int) else 0,
        "unsafe_split": -(-extent // max(given["split_size"], 1)) if isinstance(given.get("split_size"), int) else 0,
        "chunk": min(given.get("chunks", 0), extent),
        "unsafe_chunk": min(given.get("chunks", 0), extent),
    }.get(packet, given.get("sections") or 0)
    if isinstance(count, int) and count > _MOST_VALUES:
        raise IRError(f"it would give {count} values, and {_MOST_VALUES} are as many as programs may hold")


def _shape_of(result: Any) -> Seen:
    match result:
        case Tensor():
            return (result.dtype, tuple(result.shape))
        case list() | tuple():
            return tuple(_shape_of(item) for item in result)
        case bool() | None | float():
            return result
        case int() if abs(result) <= MAX:
            return result
        case _:
            raise IRError(f"it gives {str(result)[:40]}, which is no value of a program")


def _frozen(program: ProgramData, item: Any, worlds: tuple[World, ...], memo: Memo) -> Any:
    """An argument that can be compared: types in the place of nodes."""
    match item:
        case fx.Node():
            type_ = program.types[item.name]
            if isinstance(type_, ScalarType) and type_.value is None and item.target in _COMPUTED:
                return _Numbers(tuple(_Number(type(v), v) for v in _seen(program, item, worlds, memo)))
            return type_
        case list() | tuple():
            return tuple(_frozen(program, i, worlds, memo) for i in item)
        case dict():
            return tuple((k, _frozen(program, v, worlds, memo)) for k, v in item.items())
        case bool() | int() | float():
            return _Number(type(item), item)
        case _:
            return item


_COMPUTED = {function for function, _ in PYTHON.values()}


def computes_sizes(node: fx.Node) -> bool:
    """True for arithmetic on sizes: what reads it is typed by its value, not by its type alone."""
    return node.op == "call_function" and node.target in _COMPUTED


def _example(item: Any, world: World, number: int) -> Any:
    """An argument with meta tensors and numbers in the place of types."""
    match item:
        case _Number(value=value):
            return value
        case _Numbers(values=values):
            return values[number].value
        case tuple():
            return tuple(_example(i, world, number) for i in item)
        case TensorType(dtype=dtype, shape=shape):
            return torch.empty(_sizes(shape, world), dtype=dtype, device="meta")
        case TupleType(items=items):
            return tuple(_example(i, world, number) for i in items)
        case ScalarType(kind="int", value=str() as value):
            return _size(value, world)
        case ScalarType(kind="int"):
            return 3 + 2 * number  # nothing is known of it, so that no dimension may follow it
        case ScalarType(kind=kind):
            return {"float": 1.0, "bool": False}.get(kind)
        case torch.device():
            return torch.device("meta")
        case _:
            return item
