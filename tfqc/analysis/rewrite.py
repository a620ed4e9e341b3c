"""Small steps that rewriting passes share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from tfqc.ir.infer import infer_type
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program

# Give the same elements in another shape or order: what is done to each element may be done before or behind them.
MOVES = {
    "aten.reshape.default", "aten.view.default", "aten.transpose.int", "aten.permute.default",
    "aten.flatten.using_ints", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.contiguous.default",
    "aten.clone.default", "aten.unflatten.int", "aten.upsample_nearest2d.vec", "aten._unsafe_view.default",
}  # fmt: skip


def become(program: Program, node: fx.Node, target: Any, args: Iterable[Any]) -> None:
    """Let a node compute its value in another way: it keeps its name, its readers, its place."""
    node.target, node.args, node.kwargs = target, tuple(args), {}
    program.types[node.name] = infer_type(program, node)


def retype(program: Program, node: fx.Node) -> None:
    """Infer the type of a node whose operands have changed theirs."""
    program.types[node.name] = infer_type(program, node)


def name_of(node: Any) -> str:
    """The operation of a node; empty for whatever is none."""
    return op_name(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""


def operands(node: fx.Node) -> dict[str, Any]:
    """Positional arguments of an ATen or tfqc operation by the names that its schema gives them."""
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]


def changed(node: fx.Node, **values: Any) -> tuple[Any, ...]:
    """Arguments of a tfqc operation, some replaced by name."""
    return tuple({**operands(node), **values}.values())


def stores(node: Any) -> bool:
    """True for an operation of `tfqc.runtime.kernel_ops` that stores its result as its argument `out` says."""
    return name_of(node).startswith("tfqc.") and "out" in operands(node)


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one operation that reads a value, if it reads it once."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    once = sum(operand is node for operand in _flat([*reader.args, *reader.kwargs.values()])) == 1
    return reader if once and reader.op == "call_function" else None


def is_branch(node: fx.Node) -> bool:
    """True for one half of a branch of low rank: the product of a value with a stored matrix."""
    if name_of(node) != "aten.matmul.default":
        return False
    value, matrix = node.args
    return isinstance(value, fx.Node) and isinstance(matrix, fx.Node) and matrix.op == "get_attr"


def _flat(items: Iterable[Any]) -> Iterable[Any]:
    for item in items:
        if isinstance(item, (list, tuple)):
            yield from _flat(item)
        else:
            yield item


def keeps_batch(program: Program, node: fx.Node) -> bool:
    """True if the first dimension is the batch, so that rows of the schedule belong to its entries."""
    type_ = program.tensor_type(node)
    return type_ is not None and type_.shape[:1] == ("B",)
