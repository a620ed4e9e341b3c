"""The operations that are quantized: linears and convolutions with a stored weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tfqc.errors import TfqcError
from tfqc.ir.ops import op_name
from tfqc.ir.program import STEP, Program
from tfqc.ir.rows import Maintenance, Tib

WEIGHTED = {"aten.linear.default", "aten.conv2d.default", "aten.conv1d.default", "tfqc.conv2d_rows.default"}
# What multiplies by weights, where an operand is a stored tensor; `tfqc.frontend.canonical` brings some to those above.
PRODUCTS = WEIGHTED | {
    "aten.mm.default", "aten.matmul.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default",
    "aten.addbmm.default", "aten.mv.default", "aten.addmv.default", "aten.einsum.default", "aten.bilinear.default",
    "aten.tensordot.default", "aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.default",
    "aten.conv3d.padding", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input",
    "aten.conv_transpose3d.input", "aten.convolution.default",
}  # fmt: skip
# What holds weights or multiplies matrices and is left in floating point; reports name it.
LEFT_IN_FLOAT = {
    "aten.scaled_dot_product_attention.default", "aten.matmul.default", "aten.bmm.default", "aten.einsum.default",
    "aten.conv_transpose2d.input", "aten.conv3d.default", "aten.embedding.default", "aten.group_norm.default",
    "aten.layer_norm.default", "tfqc.group_norm_rows.default", "tfqc.layer_norm_rows.default", "aten.rms_norm.default",
}  # fmt: skip


def weight_of(node: fx.Node) -> str | None:
    """Name of the stored weight [O, ...] of a linear or convolution; None for any other node."""
    if node.op != "call_function" or op_name(node.target) not in WEIGHTED:
        return None
    weight = node.args[1]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def check_weights(program: Program) -> None:
    """Refuse weights that are not float32, in which models are calibrated.

    Raises:
        TfqcError: naming one.
    """
    for node in weighted_nodes(program):
        weight = str(weight_of(node))
        if (dtype := program.tensors[weight].dtype) != torch.float32:
            raise TfqcError(
                f"Weight @{weight} of {program.at(node)} is {dtype}, and models are compiled from float32: convert it "
                "with model.float() first (what is compiled takes inputs of any float dtype)."
            )


def is_linear(program: Program, node: fx.Node) -> bool:
    """True for a linear, and for a convolution of one pixel: of windows there is more than one."""
    shape = program.tensors[str(weight_of(node))].shape
    return set(shape[2:]) <= {1}


def weighted_nodes(program: Program, function: str = STEP) -> Iterator[fx.Node]:
    """Linears and convolutions of a function, in order."""
    return (node for node in program.nodes(function) if weight_of(node) is not None)


def tib_weighted(program: Program) -> list[fx.Node]:
    """Linears and convolutions of the temporal information block."""
    tib = program.table(Tib)
    return [node for node in weighted_nodes(program) if node.name in tib]


def runs_quantized(program: Program) -> list[fx.Node]:
    """Weighted nodes that run at inference: all, less those of the TIB that only folded or cached features need."""
    tib, maintenance = program.table(Tib), program.table(Maintenance)
    live: set[fx.Node] = set()
    stack = [
        n for n in program.step.nodes if n.name in maintenance and maintenance[n.name].recomputes
    ]  # fmt: skip
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in weighted_nodes(program) if n.name not in tib or not maintenance or n in live]
