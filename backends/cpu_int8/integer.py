"""Which quantized operations can multiply integers, and why the others cannot."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfqc.codegen.support import YES, Support
from tfqc.ir.match import is_call
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType
from tfqc.ir.views import Attention, Conv, Dequantize, Linear, Quantize, QuantizeDynamic, StoredWeight
from tfqc.lowering.values import keeps_batch

aten, ours = torch.ops.aten, torch.ops.tfqc

_WEIGHT = "int8{per=channel} or int4{per=channel}"


def why_not_integer(program: Program, layer: Linear | Conv) -> str:
    """Why a linear or convolution of @step cannot become a product of 8-bit codes; empty if it can."""
    return on_integers(program, layer).because


def on_integers(program: Program, layer: Linear | Conv) -> Support:
    """Whether a linear or convolution of @step can be a product of 8-bit codes, or runs in floating point."""
    stored = StoredWeight.of(layer.weight)
    if stored is None:
        return Support(True, "its weight is in floating point", "weight", _WEIGHT)
    # What lies in the model comes first: an input that is left because of it reads as another reason later on.
    if why := _of_shape(layer):
        return Support(True, why)
    if why := _of_weight(program, stored):
        return Support(True, why, "weight", _WEIGHT)
    why = _of_input(program, layer.input)
    return Support(True, why, "input", "int8{symmetric=false}") if why else YES


def _of_input(program: Program, read: fx.Node) -> str:
    if dynamic := QuantizeDynamic.of(read):
        return "" if dynamic.bits == 8 else f"its input has {dynamic.bits} bits"
    if is_call(read, aten.where.self) and _quantized(read.kwargs["other"]):
        return "its input stays in floating point at some steps"
    known = Dequantize.of(read)
    if known is None:
        return "its input is in floating point"
    made = Quantize.of(known.codes)
    if made is None:
        return "its input's codes are not computed here"
    if not keeps_batch(program, made.node):
        return "the first dimension of its input is not the batch"
    return "" if (made.qmin, made.qmax) == (0, 255) else f"its input's codes lie in {made.qmin}..{made.qmax}"


def _quantized(value: Any) -> bool:
    return Dequantize.of(value) is not None or QuantizeDynamic.of(value) is not None


def _of_weight(program: Program, stored: StoredWeight) -> str:
    if program.tensors[str(stored.scale.target)].shape[1] != 1:
        return "its weight has a scale for each group of columns"
    zero = program.tensors[str(stored.zero_point.target)]
    return "its weight's zero points are not 0" if not zero.is_meta and bool(zero.any()) else ""


def _of_shape(layer: Linear | Conv) -> str:
    if isinstance(layer, Linear):
        return ""
    if layer.target is aten.conv1d.default:
        return "it is a convolution in one dimension"
    if layer.target is aten.conv3d.default:
        return "it is a convolution in three dimensions"
    if any(len(set(pair)) > 1 for pair in (layer.stride, layer.padding)):
        return "its stride or padding differs between height and width"
    return "" if set(layer.dilation) == {1} else f"its dilation is {list(layer.dilation)}"


def why_not_attention(program: Program, attention: Attention) -> str:
    """Why kernels do not run an attention; empty if they do."""
    if attention.grouped or attention.dropout or attention.is_causal:
        return "it has dropout, a causal mask, or grouped queries"
    types = [program.tensor_type(n) for n in (attention.query, attention.key, attention.value)]
    if not keeps_batch(program, attention.node) or any(t is None or len(t.shape) != 4 for t in types):
        return "it has not the shape [batch, heads, tokens, dimension]"
    if len({(*t.shape[:2], t.shape[3]) for t in types if t is not None}) > 1:
        return "its queries, keys and values differ in batch, heads or dimension"
    if attention.mask is None:
        return ""
    type_ = program.types[attention.mask.name]
    floats = isinstance(type_, TensorType) and type_.dtype is torch.float32 and len(type_.shape) == 4
    return "" if floats else "its mask is not f32 in four dimensions"
