"""Typed views of the operations that passes read: `Linear.of(node).weight`, `Attention.of(node).attn_mask`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfqc.ir.match import View, is_stored, operand

aten, ours = torch.ops.aten, torch.ops.tfqc

Sizes = Any  # a list of numbers, of which each may be a node


class Linear(View):
    """input [..., K], weight [N, K], bias [N]."""

    targets = (aten.linear.default,)
    input = operand[fx.Node]()
    weight = operand[fx.Node]()
    bias = operand[fx.Node | None]()


class Conv(View):
    """A convolution that is no transposed one, of any number of dimensions; `bias` of conv2d_rows has rows."""

    targets = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, ours.conv2d_rows.default)
    input = operand[fx.Node]()
    weight = operand[fx.Node]()
    bias = operand[fx.Node | None]()
    stride = operand[Sizes]()
    padding = operand[Sizes]()
    dilation = operand[Sizes]()
    groups = operand[int]()


class PaddedConv(View):
    """A convolution whose padding is a word, `same` or `valid`."""

    targets = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
    input = operand[fx.Node]()
    weight = operand[fx.Node]()
    bias = operand[fx.Node | None]()
    stride = operand[Sizes]()
    padding = operand[str]()
    dilation = operand[Sizes]()
    groups = operand[int]()


class Add(View):
    """self + alpha * other."""

    targets = (aten.add.Tensor,)
    self_ = operand[Any]("self")
    other = operand[Any]()
    alpha = operand[float]()


class Mul(View):
    """self * other."""

    targets = (aten.mul.Tensor,)
    self_ = operand[Any]("self")
    other = operand[Any]()


class MatMul(View):
    """self @ other."""

    targets = (aten.matmul.default,)
    self_ = operand[fx.Node]("self")
    other = operand[fx.Node]()


class GroupNorm(View):
    """input [B, C, ...]."""

    targets = (aten.group_norm.default,)
    input = operand[fx.Node]()
    groups = operand[int]("num_groups")
    weight = operand[fx.Node | None]()
    bias = operand[fx.Node | None]()
    eps = operand[float]()


class LayerNorm(View):
    """input [..., *shape]."""

    targets = (aten.layer_norm.default,)
    input = operand[fx.Node]()
    shape = operand[Sizes]("normalized_shape")
    weight = operand[fx.Node | None]()
    bias = operand[fx.Node | None]()
    eps = operand[float]()


class GroupNormRows(View):
    """A group norm whose weight and bias [R, C] are rows of the schedule."""

    targets = (ours.group_norm_rows.default,)
    input = operand[fx.Node]()
    groups = operand[int]()
    weight = operand[fx.Node]()
    bias = operand[fx.Node]()
    eps = operand[float]()


class LayerNormRows(View):
    """A layer norm whose weight and bias [R, C] are rows of the schedule."""

    targets = (ours.layer_norm_rows.default,)
    input = operand[fx.Node]()
    shape = operand[Sizes]()
    weight = operand[fx.Node]()
    bias = operand[fx.Node]()
    eps = operand[float]()


class Attention(View):
    """softmax(query keyᵀ * scale + mask) value."""

    targets = (aten.scaled_dot_product_attention.default,)
    query = operand[fx.Node]()
    key = operand[fx.Node]()
    value = operand[fx.Node]()
    mask = operand[fx.Node | None]("attn_mask")
    dropout = operand[float]("dropout_p")
    is_causal = operand[bool]()
    scale = operand[float | None]()
    grouped = operand[bool]("enable_gqa")


class Gelu(View):
    """approximate: `none` or `tanh`."""

    targets = (aten.gelu.default,)
    x = operand[fx.Node]("self")
    approximate = operand[str]()


class Chunk(View):
    """`chunks` parts of `self` along `dim`."""

    targets = (aten.chunk.default,)
    x = operand[fx.Node]("self")
    chunks = operand[int]()
    dim = operand[int]()


class Cat(View):
    """Tensors one behind the other along `dim`; several values of one node may be given whole."""

    targets = (aten.cat.default,)
    tensors = operand[list[fx.Node] | fx.Node]()
    dim = operand[int]()


class Upsample(View):
    """Nearest-neighbour enlargement of images."""

    targets = (aten.upsample_nearest2d.vec,)
    input = operand[fx.Node]()
    output_size = operand[Sizes | None]()
    scale_factors = operand[list[float] | None]()


class Cast(View):
    """self in another dtype."""

    targets = (aten.to.dtype,)
    x = operand[fx.Node]("self")
    dtype = operand[torch.dtype]()
    copy = operand[bool]()


def stored_in(value: Any) -> str | None:
    """Name of the stored tensor that a value is: itself, or cast from the dtype that it is stored in."""
    while cast := Cast.of(value):
        value = cast.x
    return str(value.target) if is_stored(value) else None


class TableRead(View):
    """Rows of a table over the schedule."""

    targets = (ours.table_read.default,)
    table = operand[fx.Node]()
    row = operand[fx.Node]()


class Quantize(View):
    """Codes of x; scale and zero point [1], or [T] of which `row` picks."""

    targets = (ours.quantize.default,)
    x = operand[fx.Node]()
    scale = operand[fx.Node]()
    zero_point = operand[fx.Node]()
    row = operand[fx.Node | None]()
    qmin = operand[int]()
    qmax = operand[int]()


class Dequantize(View):
    """Values of codes."""

    targets = (ours.dequantize.default,)
    codes = operand[fx.Node]()
    scale = operand[fx.Node]()
    zero_point = operand[fx.Node]()
    row = operand[fx.Node | None]()


class QuantizeDynamic(View):
    """x with a scale for each token, found at run time."""

    targets = (ours.quantize_dynamic.default,)
    x = operand[fx.Node]()
    bits = operand[int]()


class QuantizeTokens(View):
    """Codes, scales and zero points of tokens."""

    targets = (ours.quantize_tokens.default,)
    x = operand[fx.Node]()
    bits = operand[int]()


class StoredWeight(View):
    """A weight from its codes: int8, or two of 4 bits a byte."""

    targets = (ours.dequantize_weight.default, ours.dequantize_weight_int4.default)
    scale = operand[fx.Node]()
    zero_point = operand[fx.Node]()
    group = operand[int]()

    @property
    def is_int4(self) -> bool:
        """True if two codes lie in a byte."""
        return self.target is ours.dequantize_weight_int4.default

    @property
    def codes(self) -> fx.Node:
        """The tensor of codes."""
        codes = self.node.kwargs["packed" if self.is_int4 else "codes"]
        assert isinstance(codes, fx.Node)
        return codes


class StoredInt4(View):
    """A weight from codes of 4 bits."""

    targets = (ours.dequantize_weight_int4.default,)
    packed = operand[fx.Node]()
    shape = operand[Sizes]()


class Tiles(View):
    """Codes from tiles."""

    targets = (ours.unpack_tiles.default,)
    packed = operand[fx.Node]()
    sums = operand[fx.Node]()
    shape = operand[Sizes]()
    groups = operand[int]()
    paired = operand[bool]()
    bits = operand[int]()


class Stores(View):
    """A kernel's operation that stores its result as `out` says: f32, bf16, f16, or codes of a row's scale."""

    targets = (
        ours.qlinear.default, ours.qconv.default, ours.norm.default, ours.map.default, ours.gated_add.default,
        ours.attention.default,
    )  # fmt: skip
    row = operand[fx.Node | None]()
    out_scale = operand[fx.Node | None]()
    out_zero_point = operand[fx.Node | None]()
    out = operand[str]()


class Product(View):
    """Codes of an input times codes of a weight, and what follows in registers."""

    targets = (ours.qlinear.default, ours.qconv.default)
    codes = operand[fx.Node]()
    scale = operand[fx.Node | None]()
    zero_point = operand[fx.Node | None]()
    row_in = operand[fx.Node | None]()
    weight = operand[fx.Node]()
    weight_scale = operand[fx.Node]()
    bias = operand[fx.Node | None]()
    act = operand[Any]()
    gate = operand[fx.Node | None]()
    residual = operand[fx.Node | None]()
    row = operand[fx.Node | None]()
    out_scale = operand[fx.Node | None]()
    out_zero_point = operand[fx.Node | None]()
    out = operand[Any]()

    @property
    def is_linear(self) -> bool:
        """True for a qlinear."""
        return self.target is ours.qlinear.default

    @property
    def low(self) -> fx.Node | None:
        """The first half of a branch of low rank."""
        return self.node.kwargs.get("low")  # type: ignore[return-value]

    @property
    def up(self) -> fx.Node | None:
        """The stored second half of a branch of low rank."""
        return self.node.kwargs.get("up")  # type: ignore[return-value]


class QConv(View):
    """A product of windows."""

    targets = (ours.qconv.default,)
    stride = operand[int]()
    padding = operand[int]()
    groups = operand[int]()


class Map(View):
    """An activation, or none, of each element."""

    targets = (ours.map.default,)
    x = operand[fx.Node]()
    act = operand[str]()
    row = operand[fx.Node | None]()
    out_scale = operand[fx.Node | None]()
    out_zero_point = operand[fx.Node | None]()
    out = operand[str]()
