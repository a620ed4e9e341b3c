"""lower-int8: quantized linears and convolutions become integer products."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.analysis.integer import why_not_integer
from tfqc.analysis.rewrite import become, name_of
from tfqc.analysis.weighted import WEIGHTED
from tfqc.ir.program import Program, Stage
from tfqc.packing import unpack_int4
from tfqc.passing import Context, Numerics, Pass, close

ours = torch.ops.tfqc


@dataclass(frozen=True)
class LowerInt8(Pass):
    """Multiply codes by codes in @step, where `dequantize` feeds a linear or convolution whose weight is stored codes.

    `tfqc.analysis.integer` says what stays in floating point, and why. Nothing happens to @begin and @time.
    """

    name: ClassVar[str] = "lower-int8"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        lowered = 0
        tokens: dict[fx.Node, list[fx.Node]] = {}
        for node in program.nodes():
            if name_of(node) not in WEIGHTED:
                continue
            if not why_not_integer(program, node):
                _lower(program, node, tokens)
                lowered += 1
        program.prune()
        if lowered:
            ctx.report.append(f"lowered to int8: {lowered} linears and convolutions")


def _lower(program: Program, node: fx.Node, tokens: dict[fx.Node, list[fx.Node]]) -> None:
    read, weight = node.args[:2]
    assert isinstance(read, fx.Node) and isinstance(weight, fx.Node)
    if name_of(read) == "tfqc.quantize_dynamic.default":
        if read not in tokens:  # once for all that read it
            found = program.insert(read, ours.quantize_tokens.default, read.args[:1], like=read)
            tokens[read] = [program.insert(read, operator.getitem, (found, i), like=read) for i in range(3)]
        codes, scale, zero = tokens[read]
        row = None
    else:
        codes, scale, zero, row = read.args
    operands = (codes, scale, zero, row, _codes(program, weight), _scale(program, weight))
    bias = node.args[2] if len(node.args) > 2 else None
    ending = ("none", None, None, None, None, None, "f32")
    if name_of(node) == "aten.linear.default":
        become(program, node, ours.qlinear.default, (*operands, bias, *ending))
        return
    stride, padding, _, groups = (*node.args[3:], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:]) :])
    become(program, node, ours.qconv.default, (*operands, bias, stride[0], padding[0], groups, *ending))  # type: ignore[index]


def _codes(program: Program, weight: fx.Node) -> fx.Node:
    """The codes of a stored weight, one a byte."""
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    if name_of(weight) == "tfqc.dequantize_weight.default":
        return stored
    name = str(stored.target).removesuffix("packed") + "codes"
    if name not in program.tensors:
        packed, shape = program.tensors[str(stored.target)], weight.args[4]
        meta = torch.empty(shape, dtype=torch.int8, device="meta")  # type: ignore[arg-type]
        program.tensors[name] = meta if packed.is_meta else unpack_int4(packed, shape)  # type: ignore[arg-type]
    return program.tensor_node(name)


def _scale(program: Program, weight: fx.Node) -> fx.Node:
    """The scales of a weight's channels, [N]."""
    stored = weight.args[1]
    assert isinstance(stored, fx.Node)
    name = f"{stored.target}.flat"
    if name not in program.tensors:
        program.tensors[name] = program.tensors[str(stored.target)].flatten()
    return program.tensor_node(name)
