"""Which quantized operations CUDA kernels multiply on tensor cores, and why the others run in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tfqc.analysis.weighted import QUANTIZED, WEIGHTED, multiplies_stored
from tfqc.codegen.support import YES, Support
from tfqc.ir.match import is_call, is_stored
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.ir.rows import RowSource
from tfqc.ir.views import Cast, Conv, Dequantize, Linear, Quantize, QuantizeDynamic, StoredWeight, TableRead
from tfqc.lowering.values import keeps_batch
from tfqc.lowering.windows import window_of
from tfqc.runtime.kernel_ops import GROUP

aten = torch.ops.aten
# Products that hold a weight and have no kernel: what is no linear and no convolution of images or rows. A branch of
# low rank is one in f16, and no lookup multiplies.
_OTHERS = tuple(op for op in WEIGHTED if op not in (*QUANTIZED, aten.matmul.default, aten.embedding.default))
_WEIGHT, _INPUT = "int4{per=channel}", "int4 or int8"
LONGEST = 65_536  # codes of a row of the input: s32 holds any sum of so many products


def why_not_tensor_cores(program: Program, layer: Linear | Conv) -> str:
    """Why kernels do not run a linear or convolution of @step whose weight is quantized; empty if they do."""
    return _on_tensor_cores(program, layer).because


def support_of(program: Program, node: fx.Node) -> Support:
    """Whether kernels run a product with a stored weight, or torch; `YES` for what is no such product.

    Kernels' own products have other names than those of ATen; a branch of low rank is to be a product in f16.
    """
    if layer := Linear.of(node) or Conv.of(node):
        found = _on_tensor_cores(program, layer)
    else:
        stored = is_call(node, *_OTHERS) and multiplies_stored(node)
        found = Support(True, f"there is no kernel for {op_name(node.target)}" if stored else "")
    return replace(found, because=f"runs in torch: {found.because}") if found.because else YES


def _on_tensor_cores(program: Program, layer: Linear | Conv) -> Support:
    stored = StoredWeight.of(_before_casts(layer.weight))
    if stored is None or not stored.is_int4:
        why = "its weight has more than 4 bits" if stored else "its weight is in floating point"
        return Support(True, why, "weight", _WEIGHT)
    if why := _of_shape(program, layer):
        return Support(True, why)
    if why := _of_weight(program, layer, stored):
        return Support(True, why, "weight", _WEIGHT)
    if why := _of_bias(program, layer.bias):
        return Support(True, why)
    why = _of_input(program, _before_casts(layer.input))
    return Support(True, why, "input", _INPUT) if why else YES


def is_step_row(program: Program, value: Any) -> bool:
    """True for a read of a table at the row of the timestep, which is the same for all of a launch."""
    read = TableRead.of(value)
    source = program.table(RowSource).get(read.row.name) if read else None
    return source is not None and source.kind == "row" and not source.label


def _before_casts(value: fx.Node) -> fx.Node:
    while cast := Cast.of(value):
        value = cast.x
    return value


def _of_shape(program: Program, layer: Linear | Conv) -> str:
    if isinstance(layer, Linear):
        return ""
    if layer.target is aten.conv1d.default:
        return "it is a convolution in one dimension"
    if layer.target is aten.conv3d.default:
        return "it is a convolution in three dimensions"
    if layer.groups != 1 or set(layer.dilation) != {1}:
        return "it has groups or a dilation"
    kernel = program.tensor_type(layer.weight)
    assert kernel is not None
    window, strides, pads = tuple(kernel.shape[2:]), tuple(layer.stride), tuple(layer.padding)
    if window == strides == (1, 1) and pads == (0, 0):
        return ""
    if window != (3, 3) or strides not in ((1, 1), (2, 2)) or pads != (1, 1):
        return f"its window is {window[0]} x {window[1]} with stride {strides[0]} and padding {pads}"
    sized = window_of(program, layer.node) is not None
    return "" if sized else "the height and width of its input are not known when it is compiled"


def _of_weight(program: Program, layer: Linear | Conv, stored: StoredWeight) -> str:
    zero, type_ = program.tensors[str(stored.zero_point.target)], program.tensor_type(stored.node)
    windowed = window_of(program, layer.node) is not None
    assert type_ is not None
    if program.tensors[str(stored.scale.target)].shape[1] != 1 and (stored.group != GROUP or windowed):
        each = f"its weight has a scale for each {stored.group} columns"
        return f"{each}: kernels take {GROUP}, of linears and windows of 1 x 1"
    channels = type_.shape[1]
    assert isinstance(channels, int)
    if -(-channels // 32) * 32 * (9 if windowed else 1) > LONGEST:
        return "its sums do not fit into 32 bits"
    return "its weight's zero points are not 0" if not zero.is_meta and bool(zero.any()) else ""


def _of_bias(program: Program, bias: fx.Node | None) -> str:
    constant = bias is None or is_stored(bias) or is_step_row(program, bias)
    return "" if constant else "its bias is computed at run time"


def _of_input(program: Program, read: fx.Node) -> str:
    if not keeps_batch(program, read):
        return "the first dimension of its input is not the batch"
    if dynamic := QuantizeDynamic.of(read):
        return "" if dynamic.bits in (4, 8) else f"its input has {dynamic.bits} bits"
    known = Dequantize.of(read)
    if known is None:
        return ""  # f16
    made = Quantize.of(known.codes)
    if made is None:
        return "its input's codes are not computed here"
    limits = (made.qmin, made.qmax)
    return "" if limits in ((0, 15), (0, 255)) else f"its input's codes lie in {made.qmin}..{made.qmax}"
