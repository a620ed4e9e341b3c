"""Reading and writing the quantizers of weighted nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, fx

from tfqc.ir.program import Program
from tfqc.ir.rows import Quantizer, RowSource
from tfqc.quant import Grid, QuantizedWeight, fake_quantize


def quantizer_of(program: Program, node: fx.Node) -> Quantizer:
    """The node's quantizer row; one that quantizes nothing if it has none."""
    return program.table(Quantizer).get(node.name, Quantizer())


def set_weight_quantizer(program: Program, node: fx.Node, weight: str, quantized: QuantizedWeight, how: str) -> None:
    """Store a quantized weight's tensors beside `weight` and name them in the node's row."""
    names = (f"{weight}.codes", f"{weight}.scale", f"{weight}.zero_point")
    # Codes of the asymmetric 8-bit grid are stored shifted; so is then the zero point, and codes − zero stays.
    zero_point = quantized.zero_point + quantized.grid.storage_shift
    values = (quantized.q, quantized.scale, zero_point.to(torch.int32))
    program.tensors.update(dict(zip(names, values, strict=True)))
    columns = quantized.q[0].numel()
    program.tables.setdefault(Quantizer.table, {})[node.name] = dataclasses.replace(
        quantizer_of(program, node),
        weight_bits=quantized.grid.bits,
        codes=names[0],
        weight_scale=names[1],
        weight_zero_point=names[2],
        group=min(quantized.group or columns, columns),
        weight_how=how,
    )


def set_input_quantizer(
    program: Program, node: fx.Node, bits: int, scale: Tensor, zero_point: Tensor, how: str
) -> None:
    """Store an input's parameters ([1] or [T]) under the input value's name, so that its readers share them."""
    value = node.all_input_nodes[0].name
    names = (f"act.{value}.scale", f"act.{value}.zero_point")
    program.tensors.update({names[0]: scale, names[1]: zero_point.to(torch.int32)})
    if scale.numel() > 1:
        sources = program.tables.setdefault(RowSource.table, {})
        sources.update({name: RowSource("activation") for name in names})
    program.tables.setdefault(Quantizer.table, {})[node.name] = dataclasses.replace(
        quantizer_of(program, node),
        input_bits=bits,
        input_scale=names[0],
        input_zero_point=names[1],
        input_how=how,
    )


def stored_weight(program: Program, row: Quantizer) -> Tensor:
    """The weight [O, ...] that a quantizer's codes stand for, f32."""
    return torch.ops.tfqc.dequantize_weight(
        program.tensors[row.codes],
        program.tensors[row.weight_scale],
        program.tensors[row.weight_zero_point],
        row.group,
    )


def input_fake_quantizer(program: Program, row: Quantizer, repeats: int = 1) -> Callable[[Tensor], Tensor]:
    """Fake quantization of a node's input whose first dimension is steps, each `repeats` times."""
    if not row.input_scale:
        return lambda x: torch.ops.tfqc.quantize_dynamic(x, row.input_bits)
    scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
    grid = Grid(row.input_bits, symmetric=False)

    def apply(x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1))
        s, z = (p.repeat_interleave(repeats) if p.numel() > 1 else p for p in (scale, zero_point))
        return fake_quantize(x, s.reshape(shape), z.reshape(shape), grid)

    return apply
