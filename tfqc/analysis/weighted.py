"""The operations that multiply by stored weights: where their operands are, and which of them are quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tfqc.errors import TfqcError
from tfqc.ir.match import is_call, is_stored
from tfqc.ir.ops import is_view
from tfqc.ir.program import STEP, Program
from tfqc.ir.rows import Maintenance, Tib
from tfqc.ir.views import stored_in

aten, ours = torch.ops.aten, torch.ops.tfqc


@dataclass(frozen=True)
class Weighted:
    """Where an operation has its input, weight and bias, by the names of its schema.

    axis: the dimension of the weight that is the output channels. windows: how many of its last dimensions are windows
    of the input. groups: the operand that says how many. why_not: why it is left in floating point; empty if it is
    quantized. does: words for what it does with its weight.
    """

    input: str = "input"
    weight: str = "weight"
    bias: str = "bias"
    axis: int = 0
    windows: int = 0
    groups: str = ""
    why_not: str = ""
    does: str = "multiplies by"


def _conv(windows: int, **others: Any) -> Weighted:
    return Weighted(windows=windows, groups="groups", **others)


_TRANSPOSED = "the output channels of a transposed convolution are not the rows of its weight"
_WORDS = "a padding in words is given in numbers by normalize, for convolutions of sequences and images"
_LOOKUP = "a lookup multiplies nothing"
_PRODUCT = "it is no linear layer of one stored matrix"
_EXPERTS = "it multiplies by a matrix for each expert, and quantizers have one for each layer"
_SUM = "it is a sum of products that is no linear layer"

WEIGHTED: dict[Any, Weighted] = {
    aten.linear.default: Weighted(),
    aten.conv1d.default: _conv(1),
    aten.conv2d.default: _conv(2),
    aten.conv3d.default: _conv(3),
    ours.conv2d_rows.default: _conv(2),
    aten.conv1d.padding: _conv(1, why_not=_WORDS),
    aten.conv2d.padding: _conv(2, why_not=_WORDS),
    aten.conv3d.padding: _conv(3, why_not=_WORDS),
    aten.conv_transpose1d.default: _conv(1, axis=1, why_not=_TRANSPOSED),
    aten.conv_transpose2d.input: _conv(2, axis=1, why_not=_TRANSPOSED),
    aten.conv_transpose3d.input: _conv(3, axis=1, why_not=_TRANSPOSED),
    aten.convolution.default: Weighted(groups="groups", why_not="it is a convolution of any kind, transposed or not"),
    aten.embedding.default: Weighted("indices", bias="", why_not=_LOOKUP, does="looks up rows of"),
    aten.mm.default: Weighted("self", "mat2", "", 1, why_not=_PRODUCT),
    aten.matmul.default: Weighted("self", "other", "", 1, why_not=_PRODUCT),
    aten.mv.default: Weighted("vec", "self", "", why_not=_PRODUCT),
    aten.addmm.default: Weighted("mat1", "mat2", "self", 1, why_not=_PRODUCT),
    aten.addmv.default: Weighted("vec", "mat", "self", why_not=_PRODUCT),
    aten.bmm.default: Weighted("self", "mat2", "", 2, why_not=_EXPERTS),
    aten.baddbmm.default: Weighted("batch1", "batch2", "self", 2, why_not=_EXPERTS),
    aten.addbmm.default: Weighted("batch1", "batch2", "self", 2, why_not=_SUM),
    aten.bilinear.default: Weighted("input1", why_not=_SUM),
    aten.tensordot.default: Weighted("self", "other", "", why_not=_SUM),
    aten.einsum.default: Weighted("tensors", "tensors", "", why_not=_SUM),
}
QUANTIZED = tuple(target for target, row in WEIGHTED.items() if not row.why_not)

_FAR = 8  # calls between a stored weight and its product: scales, casts, turns
# A lookup multiplies nothing.
_PRODUCTS = tuple(target for target in WEIGHTED if target is not aten.embedding.default)


def is_weighted(value: Any) -> bool:
    """True for a call of an operation that is quantized where its weight is stored."""
    return is_call(value, *QUANTIZED)


def weight_of(node: fx.Node) -> str | None:
    """Name of the stored weight [O, ...] of a node that is quantized; None for any other node."""
    if not is_weighted(node):
        return None
    return stored_in(node.kwargs[WEIGHTED[node.target].weight])


def multiplies_stored(node: fx.Node) -> bool:
    """True for a product, quantized or not, with a weight of the model, however that is stored, cast or turned."""
    return is_call(node, *_PRODUCTS) and any(map(_is_of_model, node.all_input_nodes))


def _is_of_model(value: fx.Node) -> bool:
    waiting, calls = [value], 0
    while waiting:
        node = waiting.pop()
        if is_stored(node):
            continue
        calls += 1
        if not is_call(node) or not node.all_input_nodes or calls > _FAR:
            return False
        waiting += node.all_input_nodes
    return True


def left_weights(program: Program, node: fx.Node) -> list[str]:
    """Stored floating tensors of several dimensions that a call which is left in floating point multiplies by, or looks
    up, itself or a view of them; none for any other node."""
    row = WEIGHTED.get(node.target) if node.op == "call_function" else None
    if row is None or not row.why_not:
        return []
    found: list[str] = []
    for operand in node.all_input_nodes:
        while is_call(operand) and is_view(operand):
            operand = operand.all_input_nodes[0]
        if is_stored(operand) and (tensor := program.tensors[str(operand.target)]).is_floating_point():
            found += [str(operand.target)] if tensor.dim() > 1 else []
    return found


def check_weights(program: Program) -> None:
    """Refuse weights that are neither float32, in which models are calibrated, nor become it without a rounding.

    Raises:
        TfqcError: naming one.
    """
    for node in weighted_nodes(program):
        weight = str(weight_of(node))
        if (dtype := program.tensors[weight].dtype) not in (torch.float32, torch.float16, torch.bfloat16):
            raise TfqcError(
                f"Weight @{weight} of {program.at(node)} is {dtype}, and models are compiled from float32, bfloat16 or "
                "float16: convert it with model.float() first (what is compiled takes inputs of any float dtype)."
            )


def is_linear(program: Program, node: fx.Node) -> bool:
    """True for a linear, and for a convolution of one pixel: of windows there is more than one."""
    shape = program.tensors[str(weight_of(node))].shape
    return set(shape[2:]) <= {1}


def weighted_nodes(program: Program, function: str = STEP) -> Iterator[fx.Node]:
    """Nodes of a function that are quantized, in order."""
    return (node for node in program.nodes(function) if weight_of(node) is not None)


def tib_weighted(program: Program) -> list[fx.Node]:
    """Linears and convolutions of the temporal information block."""
    tib = program.table(Tib)
    return [node for node in weighted_nodes(program) if node.name in tib]


def runs_quantized(program: Program) -> list[fx.Node]:
    """Weighted nodes that run at inference: all, less those of the TIB that only folded or cached features need."""
    tib, maintenance = program.table(Tib), program.table(Maintenance)
    live: set[fx.Node] = set()
    stack = [n for n in program.step.nodes if n.name in maintenance and maintenance[n.name].recomputes]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return [n for n in weighted_nodes(program) if n.name not in tib or not maintenance or n in live]
