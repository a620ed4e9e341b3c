"""Questions about values that lowering passes share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfqc.ir.match import is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import MatMul

aten = torch.ops.aten

# Give the same elements in another shape or order: what is done to each element may be done before or behind them.
MOVES = frozenset({
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default, aten.clone.default, aten.unflatten.int,
    aten.upsample_nearest2d.vec, aten._unsafe_view.default,
})  # fmt: skip


def moved(node: fx.Node) -> fx.Node:
    """What one of `MOVES` moves."""
    return node.all_input_nodes[0]


def branch_of(value: Any) -> MatMul | None:
    """One half of a branch of low rank: the product of a value with a stored matrix."""
    product = MatMul.of(value)
    return product if product and is_stored(product.other) else None


def keeps_batch(program: Program, node: fx.Node) -> bool:
    """True if the first dimension is the batch, so that rows of the schedule belong to its entries."""
    type_ = program.tensor_type(node)
    return type_ is not None and type_.shape[:1] == (program.batch,)
