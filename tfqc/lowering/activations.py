"""Activation functions in graphs."""

from __future__ import annotations

import torch
from torch import fx

from tfqc.ir.match import is_call, item_of, only_reader
from tfqc.ir.program import Program
from tfqc.ir.views import Chunk, Gelu

aten = torch.ops.aten


def activation_of(node: fx.Node) -> str:
    """The kernels' name of an activation: `silu`, `gelu` or `gelu_tanh`; empty for any other node."""
    if is_call(node, aten.silu.default):
        return "silu"
    gelu = Gelu.of(node)
    return "" if gelu is None else "gelu_tanh" if gelu.approximate == "tanh" else "gelu"


def geglu_end(program: Program, node: fx.Node) -> fx.Node | None:
    """The product of value and gelu(gate), where that is all that becomes of the two halves of a last dimension."""
    chunk = Chunk.of(node)
    type_ = program.tensor_type(chunk.x) if chunk else None
    if chunk is None or type_ is None or chunk.chunks != 2 or chunk.dim not in (-1, len(type_.shape) - 1):
        return None
    halves = {item[1]: n for n in node.users if (item := item_of(n))}
    if len(node.users) != 2 or set(halves) != {0, 1}:
        return None
    gelu, end = only_reader(halves[1]), only_reader(halves[0])
    if gelu is None or end is None or activation_of(gelu) != "gelu" or not is_call(end, aten.mul.Tensor):
        return None
    return end if only_reader(gelu) is end else None
