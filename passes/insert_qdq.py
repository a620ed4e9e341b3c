"""insert-qdq: quantizers become operations: stored integer weights, quantize and dequantize around activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.analysis.weighted import WEIGHTED, is_weighted
from tfqc.errors import PassError
from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_call
from tfqc.ir.ops import op_name
from tfqc.ir.program import TIME, Program, Stage
from tfqc.ir.rows import BindingTime, Quantizer, QuantPlan, RowSource, Tib
from tfqc.ir.tables import Fact, Row
from tfqc.passing import LOSSY, Context, Numerics, Pass
from tfqc.quant.formats import specs_to_text
from tfqc.quant.parameters import input_grid
from tfqc.quant.plan import planned
from tfqc.runtime.packing import pack_int4

aten, ours = torch.ops.aten, torch.ops.tfqc
# What holds weights or multiplies matrices and is left in floating point, beside layers that are not quantized.
_LEFT = (
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.einsum.default,
    aten.conv_transpose2d.input, aten.embedding.default, aten.group_norm.default, aten.layer_norm.default,
    ours.group_norm_rows.default, ours.layer_norm_rows.default, aten.rms_norm.default,
)  # fmt: skip


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Make quantization explicit in @step and @begin; @time stays in full precision.

    Weights of up to 4 bits are packed two a byte. Values that several operations read with the same parameters are
    quantized once. Reports every weight and product that is left in floating point.
    """

    name: ClassVar[str] = "insert-qdq"
    needs: ClassVar[Stage] = Stage.FOLDED
    below: ClassVar[Stage | None] = Stage.LOWERED
    requires: ClassVar[frozenset[Fact]] = frozenset({Quantizer})
    preserves: ClassVar[frozenset[type[Row]]] = frozenset({BindingTime, Tib})
    reaches: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step and @begin."""
        row = next((n for n, s in program.table(RowSource).items() if s.kind == "row"), "")
        quantizers = program.table(Quantizer)
        _check_filled(program, quantizers)
        left: dict[str, int] = {}
        packed: dict[str, str] = {}  # of codes that are packed: the name under which they are
        for function in [f for f in program.functions if f != TIME]:
            shared: dict[tuple[str, str], fx.Node] = {}
            for node in program.nodes(function):
                if node.name not in quantizers or not is_weighted(node):  # a parameter may have a hoisted node's name
                    if is_weighted(node) or is_call(node, *_LEFT):
                        kind = op_name(node.target).split(".")[1]
                        left[kind] = left.get(kind, 0) + 1
                    continue
                quantizer = quantizers[node.name]
                if quantizer.input_bits:
                    _quantize_input(program, function, node, quantizer, row, shared)
                if quantizer.codes:
                    _quantize_weight(program, function, node, quantizer, packed)
        del program.tables[Quantizer.table]  # the graph says it now; what the table kept alive may go
        program.prune()
        if protected := [program.tensors[q.input_protected] for q in quantizers.values() if q.input_protected]:
            ctx.remark("protected-steps", count=len(protected), protected=_most(protected), steps=len(protected[0]))
        if left:
            ctx.remark("left-in-float", **left)


def _most(masks: list[torch.Tensor]) -> int:
    return max(0 if mask.is_meta else int(mask.sum()) for mask in masks)


def _check_filled(program: Program, quantizers: dict[str, Quantizer]) -> None:
    """Refuse a program in which an operand is planned that no pass has found parameters for."""
    for function in [f for f in program.functions if f != TIME]:
        for node in filter(is_call, program.nodes(function)):
            if node.name in program.table(Tib):  # which may be kept in full precision, whatever was planned for it
                continue
            row = quantizers.get(node.name, Quantizer())
            filled = {"weight": bool(row.codes), "input": bool(row.input_bits)}
            plan = program.table(QuantPlan).get(node.name)
            for operand in plan.operands if plan is not None else ():
                specs = planned(program, node, operand)
                if any(spec.is_quantized for spec in specs) and not filled.get(operand, False):
                    passes = {"weight": "calibrate-weights", "input": "calibrate-activations"}.get(operand, "")
                    advice = f"put {passes} before insert-qdq" if passes else "no pass does, so plan it as float"
                    raise PassError(
                        f"The {operand} of {program.at(node)} is planned as {specs_to_text(specs)}, and no pass has "
                        f"found its parameters: {advice}."
                    )


def _quantize_input(
    program: Program,
    function: str,
    node: fx.Node,
    quantizer: Quantizer,
    row: str,
    shared: dict[tuple[str, str], fx.Node],
) -> None:
    operand = WEIGHTED[node.target].input
    value = node.kwargs[operand]
    assert isinstance(value, fx.Node)
    key = (
        value.name,
        f"{quantizer.input_scale}/{quantizer.input_bits}/{quantizer.input_top}/{quantizer.input_protected}",
    )
    if key not in shared:
        if not quantizer.input_scale:
            args = (value, quantizer.input_bits)
            shared[key] = program.insert(node, ours.quantize_dynamic.default, args, function=function)
        else:
            scale, zero_point = (
                program.tensor_node(n, function) for n in (quantizer.input_scale, quantizer.input_zero_point)
            )
            per_step = program.table(RowSource).get(quantizer.input_scale) is not None
            index = program.node(row, function) if per_step else None
            grid = input_grid(quantizer)
            codes = program.insert(
                node,
                ours.quantize.default,
                (value, scale, zero_point, index, grid.qmin, grid.qmax),
                name=f"{value.name}_q",
                function=function,
            )
            shared[key] = program.insert(
                node,
                ours.dequantize.default,
                (codes, scale, zero_point, index),
                name=f"{value.name}_dq",
                function=function,
            )
        if quantizer.input_protected:
            shared[key] = _protect(program, function, node, value, shared[key], quantizer.input_protected, row)
    Rewriter(program, function).update(node, **{operand: shared[key]})


def _protect(
    program: Program, function: str, node: fx.Node, value: fx.Node, quantized: fx.Node, steps: str, row: str
) -> fx.Node:
    """The value as it is at protected steps, as it was quantized at the others."""
    args = (program.tensor_node(steps, function), 0, program.node(row, function))
    protected = program.insert(node, aten.index_select.default, args, name=f"{value.name}_protected", function=function)
    return program.insert(
        node, aten.where.self, (protected, value, quantized), name=f"{value.name}_kept", function=function
    )


def _quantize_weight(
    program: Program, function: str, node: fx.Node, quantizer: Quantizer, packed: dict[str, str]
) -> None:
    codes = program.tensors[quantizer.codes]
    operands = [program.tensor_node(n, function) for n in (quantizer.weight_scale, quantizer.weight_zero_point)]
    if quantizer.weight_bits <= 4:
        if quantizer.codes not in packed:
            pairs = torch.empty((codes.numel() + 1) // 2, dtype=torch.uint8, device="meta")
            pairs = pairs if codes.is_meta else pack_int4(codes)
            packed[quantizer.codes] = program.add_tensor(quantizer.codes.removesuffix("codes") + "packed", pairs)
        args = (program.tensor_node(packed[quantizer.codes], function), *operands, quantizer.group, list(codes.shape))
        target = ours.dequantize_weight_int4.default
    else:
        args = (program.tensor_node(quantizer.codes, function), *operands, quantizer.group)
        target = ours.dequantize_weight.default
    weight = program.insert(node, target, args, name=f"{node.name}_weight", function=function)
    Rewriter(program, function).update(node, **{WEIGHTED[node.target].weight: weight})
