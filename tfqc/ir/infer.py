"""Types of new nodes, by running the operation on the meta device under several values of the symbols.

Each symbol is varied in turn; a dimension that follows is expressed by an operand's dimension that follows alike,
else as a linear expression of that symbol.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import IRError
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.ir.types import Dim, ScalarType, TensorType, TupleType, Type, evaluate, symbols_of

World = tuple[tuple[str, int], ...]  # a value for each symbol


@dataclass(frozen=True)
class _Number:
    """A number that differs from an equal one of another type: adding 1.0 to integers gives other than adding 1."""

    type: type
    value: float


def infer_type(program: Program, node: fx.Node) -> Type:
    """The type of a `call_function` node from its operands' types.

    Raises:
        IRError: the operation refuses such operands, or a dimension is no linear expression of one symbol.
    """
    operands = [program.types[n.name] for n in node.all_input_nodes]
    symbols = sorted({s for type_ in operands for s in symbols_of(type_)})
    base = {s: program.symbols.get(s, 2) for s in symbols}
    worlds = [base, *({**base, s: 2 * base[s]} for s in symbols)]
    results = _run(program, node, tuple(tuple(world.items()) for world in worlds))
    own = [program.types[node.name]] if node.name in program.types else []  # of what it was before it was rewritten
    known = {d for type_ in (*operands, *own) for d in _dims(type_) if isinstance(d, str)}
    expressions = {tuple(evaluate(d, w) for w in worlds): d for d in sorted(known, key=len, reverse=True)}

    def dim(values: tuple[int, ...]) -> Dim:
        if len(set(values)) == 1:
            return values[0]
        if values in expressions:
            return expressions[values]
        moved = [i for i, v in enumerate(values[1:]) if v != values[0]]
        if len(moved) == 1:
            symbol = symbols[moved[0]]
            slope, rest = divmod(values[1 + moved[0]] - values[0], base[symbol])
            offset = values[0] - slope * base[symbol]
            if rest == 0:
                product = symbol if slope == 1 else f"{slope}*{symbol}"
                return product if offset == 0 else f"{product} + {offset}"
        raise IRError(f"The shape of %{node.name} = {op_name(node.target)}(...) follows {symbols} in no simple way.")

    def unify(outs: list[Any]) -> Type:
        first = outs[0]
        if isinstance(first, Tensor):
            return TensorType(first.dtype, tuple(dim(tuple(o.shape[i] for o in outs)) for i in range(first.dim())))
        if isinstance(first, (list, tuple)):
            return TupleType(tuple(unify([o[i] for o in outs]) for i in range(len(first))))
        if isinstance(first, bool) or first is None:
            return ScalarType(type(first).__name__.replace("NoneType", "none"))
        return ScalarType(type(first).__name__, str(dim(tuple(outs))) if isinstance(first, int) else None)

    return unify(list(results))


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


def _run(program: Program, node: fx.Node, worlds: tuple[World, ...]) -> tuple[Any, ...]:
    """What the operation gives in each world: models repeat the same operation on the same types many times."""
    args, kwargs = _frozen(program, node.args), _frozen(program, node.kwargs)
    try:
        try:
            return _outputs(node.target, args, kwargs, worlds)
        except TypeError:  # an argument, such as a slice, has no hash
            return _outputs.__wrapped__(node.target, args, kwargs, worlds)
    except Exception as error:
        types = ", ".join(f"%{n.name}: {program.types[n.name]}" for n in node.all_input_nodes)
        raise IRError(f"{op_name(node.target)} refuses its operands ({types}): {error}") from error


@functools.lru_cache(maxsize=4096)
def _outputs(target: Any, args: Any, kwargs: Any, worlds: tuple[World, ...]) -> tuple[Any, ...]:
    return tuple(
        target(*_example(args, dict(world)), **{k: _example(v, dict(world)) for k, v in kwargs}) for world in worlds
    )


def _frozen(program: Program, item: Any) -> Any:
    """An argument that can be compared: types in the place of nodes."""
    match item:
        case fx.Node():
            return program.types[item.name]
        case list() | tuple():
            return tuple(_frozen(program, i) for i in item)
        case dict():
            return tuple((k, _frozen(program, v)) for k, v in item.items())
        case bool() | int() | float():
            return _Number(type(item), item)
        case _:
            return item


def _example(item: Any, world: dict[str, int]) -> Any:
    """An argument with meta tensors and numbers in the place of types."""
    match item:
        case _Number(value=value):
            return value
        case tuple():
            return tuple(_example(i, world) for i in item)
        case TensorType(dtype=dtype, shape=shape):
            return torch.empty([evaluate(d, world) for d in shape], dtype=dtype, device="meta")
        case TupleType(items=items):
            return tuple(_example(i, world) for i in items)
        case ScalarType(kind="int", value=str() as value):
            return evaluate(value, world)
        case ScalarType(kind="int"):
            return 1
        case ScalarType(kind=kind):
            return {"float": 1.0, "bool": False}.get(kind)
        case _:
            return item
