"""Which quantized operations can multiply integers, and why the others cannot."""

from __future__ import annotations

import torch
from torch import fx

from tfqc.analysis.rewrite import keeps_batch, name_of
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType

_WEIGHT = "int8{per=channel} or int4{per=channel}"


def why_not_integer(program: Program, node: fx.Node) -> str:
    """Why a linear or convolution of @step cannot become a product of 8-bit codes; empty if it can."""
    return on_integers(program, node).because


def on_integers(program: Program, node: fx.Node) -> Support:
    """Whether a linear or convolution of @step can be a product of 8-bit codes, or runs in floating point."""
    read, weight = node.args[:2]
    if name_of(weight) not in ("tfqc.dequantize_weight.default", "tfqc.dequantize_weight_int4.default"):
        return Support(True, "its weight is in floating point", "weight", _WEIGHT)
    assert isinstance(weight, fx.Node) and isinstance(read, fx.Node)
    # What lies in the model comes first: an input that is left because of it reads as another reason later on.
    if why := _of_shape(program, node):
        return Support(True, why)
    if why := _of_weight(program, weight):
        return Support(True, why, "weight", _WEIGHT)
    why = _of_input(program, read)
    return Support(True, why, "input", "int8{symmetric=false}") if why else YES


def _of_input(program: Program, read: fx.Node) -> str:
    if name_of(read) == "tfqc.quantize_dynamic.default":
        return "" if read.args[1] == 8 else f"its input has {read.args[1]} bits"
    if name_of(read) != "tfqc.dequantize.default":
        return "its input is in floating point"
    codes = read.args[0]
    if name_of(codes) != "tfqc.quantize.default":
        return "its input's codes are not computed here"
    assert isinstance(codes, fx.Node)
    if not keeps_batch(program, codes):
        return "the first dimension of its input is not the batch"
    return "" if codes.args[4:] == (0, 255) else f"its input's codes lie in {codes.args[4]}..{codes.args[5]}"


def _of_weight(program: Program, weight: fx.Node) -> str:
    _, scale, zero_point = weight.args[:3]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    if program.tensors[str(scale.target)].shape[1] != 1:
        return "its weight has a scale for each group of columns"
    zero = program.tensors[str(zero_point.target)]
    return "its weight's zero points are not 0" if not zero.is_meta and bool(zero.any()) else ""


def _of_shape(program: Program, node: fx.Node) -> str:
    name = name_of(node)
    if name == "aten.linear.default":
        return ""
    if name == "aten.conv1d.default":
        return "it is a convolution in one dimension"
    stride, padding, dilation = (*node.args[3:6], *([1, 1], [0, 0], [1, 1])[len(node.args[3:6]) :])
    if isinstance(padding, str):
        return f"its padding is {padding!r}"
    if any(len(set(pair)) > 1 for pair in (stride, padding)):  # type: ignore[arg-type]
        return "its stride or padding differs between height and width"
    return "" if set(dilation) == {1} else f"its dilation is {dilation}"  # type: ignore[arg-type]


def why_not_attention(program: Program, node: fx.Node) -> str:
    """Why kernels do not run an attention; empty if they do."""
    if node.kwargs.get("enable_gqa") or (len(node.args) > 4 and any(node.args[4:])) or node.kwargs.get("is_causal"):
        return "it has dropout, a causal mask, or grouped queries"
    types = [program.tensor_type(n) for n in node.args[:3]]  # type: ignore[arg-type]
    if not keeps_batch(program, node) or any(t is None or len(t.shape) != 4 for t in types):
        return "it has not the shape [batch, heads, tokens, dimension]"
    if len({(*t.shape[:2], t.shape[3]) for t in types if t is not None}) > 1:
        return "its queries, keys and values differ in batch, heads or dimension"
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if mask is None:
        return ""
    type_ = program.types[mask.name] if isinstance(mask, fx.Node) else None
    floats = isinstance(type_, TensorType) and type_.dtype is torch.float32 and len(type_.shape) == 4
    return "" if floats and len(node.args) > 3 else "its mask is not f32 in four dimensions"
