"""Reading and writing the quantizers of weighted nodes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from tfqc.ir.program import Program
from tfqc.ir.rows import Quantizer, RowSource
from tfqc.quant.grid import Grid, QuantizedWeight, fake_quantize


def quantizer_of(program: Program, node: fx.Node) -> Quantizer:
    """The node's quantizer row; one that quantizes nothing if it has none."""
    return program.table(Quantizer).get(node.name, Quantizer())


def set_weight_quantizer(program: Program, node: fx.Node, weight: str, quantized: QuantizedWeight, how: str) -> None:
    """Store a quantized weight's tensors beside `weight` and name them in the node's row."""
    grid = quantized.grid
    shift = _stored_shift(grid)
    codes, scale, zero_point = _store(
        program,
        weight,
        {
            "codes": (quantized.codes() + shift).to(torch.int8),
            "scale": quantized.scale,
            "zero_point": (quantized.zero_point + shift).to(torch.int32),
        },
    )
    columns = quantized.q[0].numel()
    program.tables.setdefault(Quantizer.table, {})[node.name] = dataclasses.replace(
        quantizer_of(program, node),
        weight_bits=grid.bits,
        codes=codes,
        weight_scale=scale,
        weight_zero_point=zero_point,
        group=min(quantized.group or columns, columns),
        weight_how=how,
    )


def _stored_shift(grid: Grid) -> int:
    """Codes of asymmetric grids are stored shifted, so that 8 bits fit int8 and 4 bits a signed nibble; so is then the
    zero point, and codes − zero stays."""
    return -8 if grid.bits == 4 and not grid.symmetric else grid.storage_shift


def set_input_quantizer(
    program: Program, node: fx.Node, bits: int, scale: Tensor, zero_point: Tensor, how: str, top: int = 0
) -> None:
    """Store an input's parameters ([1] or [T]) under the input value's name, so that its readers share them.

    top: its highest code; 0 = 2^bits - 1.
    """
    value = node.all_input_nodes[0].name
    parameters = {"scale": scale, "zero_point": zero_point.to(torch.int32)}
    names = _store(program, f"act.{value}", parameters)
    sources = program.tables.setdefault(RowSource.table, {})
    for name in names:
        sources.pop(name, None)
        if scale.numel() > 1:
            sources[name] = RowSource("activation")
    program.tables.setdefault(Quantizer.table, {})[node.name] = dataclasses.replace(
        quantizer_of(program, node),
        input_bits=bits,
        input_scale=names[0],
        input_zero_point=names[1],
        input_how=how,
        input_top=top,
    )


def set_protected(program: Program, node: fx.Node, steps: Sequence[bool]) -> None:
    """Let a node's input stay in floating point at the steps that are True; none are where there are none."""
    type_ = program.tensor_type(node.all_input_nodes[0])
    if not any(steps) or type_ is None:
        return
    mask = torch.tensor(steps).reshape(-1, *[1] * (len(type_.shape) - 1))
    (name,) = _store(program, f"act.{node.all_input_nodes[0].name}", {"protected": mask})
    program.tables.setdefault(RowSource.table, {})[name] = RowSource("activation")
    rows = program.tables.setdefault(Quantizer.table, {})
    rows[node.name] = dataclasses.replace(quantizer_of(program, node), input_protected=name)


def _store(program: Program, base: str, values: Mapping[str, Tensor]) -> list[str]:
    """Keep tensors as `base.scale` and so on, once where several nodes have the same; under another base otherwise."""
    for number in itertools.count():
        stem = f"{base}.{number}" if number else base
        names = [f"{stem}.{part}" for part in values]
        if not any(name in program.tensors for name in names):
            return program.add_tensors(base, values)
        owned = {name for row in program.table(Quantizer).values() for name in row.tensors()}
        same = (n in owned and _same(program.tensors[n], v) for n, v in zip(names, values.values(), strict=True))
        if all(same):
            return names
    raise AssertionError


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or b.is_meta or torch.equal(a, b))


def has_rows(program: Program, value: fx.Node) -> bool:
    """True for a value whose first dimension is the batch, so that each entry can have parameters of its own."""
    type_ = program.tensor_type(value)
    return type_ is not None and type_.shape[:1] == (program.batch,)


def input_grid(row: Quantizer) -> Grid:
    """The codes of an input that has scales."""
    return Grid(row.input_bits, symmetric=False, top=row.input_top)


def stored_weight(program: Program, row: Quantizer) -> Tensor:
    """The weight [O, ...] that a quantizer's codes stand for, f32."""
    return torch.ops.tfqc.dequantize_weight(
        program.tensors[row.codes],
        program.tensors[row.weight_scale],
        program.tensors[row.weight_zero_point],
        row.group,
    )


def quantized_weight(program: Program, row: Quantizer, symmetric: bool) -> QuantizedWeight:
    """A quantizer's weight as codes and parameters: what `set_weight_quantizer` was given."""
    grid = Grid(row.weight_bits, symmetric)
    shift = _stored_shift(grid)
    codes = program.tensors[row.codes].int() - shift
    zero_point = program.tensors[row.weight_zero_point] - shift
    return QuantizedWeight.from_codes(codes, program.tensors[row.weight_scale], zero_point, grid, row.group)


def input_fake_quantizer(program: Program, row: Quantizer, repeats: int = 1) -> Callable[[Tensor], Tensor]:
    """Fake quantization of a node's input whose first dimension is steps, each `repeats` times."""
    quantize = _input_fake_quantizer(program, row, repeats)
    if not row.input_protected:
        return quantize
    protected = program.tensors[row.input_protected].repeat_interleave(repeats, 0)
    return lambda x: torch.where(protected, x, quantize(x))


def _input_fake_quantizer(program: Program, row: Quantizer, repeats: int) -> Callable[[Tensor], Tensor]:
    if not row.input_scale:
        return lambda x: torch.ops.tfqc.quantize_dynamic(x, row.input_bits)
    scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
    grid = input_grid(row)

    def apply(x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1))
        s, z = (p.repeat_interleave(repeats) if p.numel() > 1 else p for p in (scale, zero_point))
        return fake_quantize(x, s.reshape(shape), z.reshape(shape), grid)

    return apply
