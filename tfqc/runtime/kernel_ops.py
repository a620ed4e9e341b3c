"""Operations of lowered programs that real kernels run: integer products with what follows them, norms, maps.

Each is defined here as a composition in torch: that is what the reference interpretation runs, what kernels are tested
against, and what runs where kernels cannot be built. Integer products are exact (computed in f64, |acc| < 2^53).

Fused operations share an ending. With y the value so far:

    y = act(y); y = y * gate; y = y + residual; stored as `out`: f32, bf16, f16, or a byte for each code of
    quantize(y, out_scale, out_zero), in 8 bits (u8) or 4 (u4)

Scales and zero points are [1], or [T] rows of the schedule that `row` [R] picks; bias, gate, norm weights are [C], or
[R, C] with a row for the whole batch or one for each entry.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfqc.runtime.ops import _define, quantize

_STORED = 'Tensor? row=None, Tensor? out_scale=None, Tensor? out_zero_point=None, str out="f32"'
ENDING = f'str act="none", Tensor? gate=None, Tensor? residual=None, {_STORED}'
_INPUT = "Tensor codes, Tensor? scale, Tensor? zero_point, Tensor? row_in"
CODES = {"u8": 255, "u4": 15}  # the greatest code
_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
GROUP = 128  # columns of a weight that share a scale where there are several for each of its rows


@_define("unpack_tiles(Tensor packed, Tensor sums, int[] shape, int groups, bool paired, int bits) -> Tensor")
def unpack_tiles(packed: Tensor, sums: Tensor, shape: list[int], groups: int, paired: bool, bits: int) -> Tensor:
    """Weight codes int8 of `shape` [N, K] or [N, C, kh, kw] from tiles (`tfqc.runtime.tiles`); bits = 4: two a byte.

    sums i32, of each output's codes in the order of the tiles: kernels take zero points off with them.
    """
    from tfqc.runtime.tiles import unpack  # which needs no operation

    return unpack(packed, shape, groups, paired, bits)


@_define(
    f"qlinear({_INPUT}, Tensor weight, Tensor weight_scale, Tensor? bias=None, {ENDING}, Tensor? low=None,"
    " Tensor? up=None) -> Tensor"
)
def qlinear(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    row_in: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """codes u8 [B, ..., K], weight int8 [N, K], weight_scale f32 [N]: [B, ..., N], N halved by act = geglu.

    y = float(acc) * (scale * weight_scale) + bias with acc = sum_k (codes - zero_point) * weight. Where weight_scale is
    [N, G], groups of 128 columns have sums of their own: y = (sum_g float(acc_g) * weight_scale_g) * scale + bias.
    Without scale and zero point, codes are floating point values as they are, and weights of groups are rounded to f16.
    low [B, ..., r] times up [r, N], a branch of low rank, is added before the bias.
    """
    rank = codes.dim()
    x = centred(codes, zero_point, row_in)
    if weight_scale.dim() > 1 and scale is None:
        wide = weight_scale.to(torch.float16).repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
        y = F.linear(x, (weight * wide).to(torch.float64)).to(torch.float32)
    elif weight_scale.dim() > 1:
        parts = zip(x.split(GROUP, -1), weight.to(torch.float64).split(GROUP, 1), weight_scale.T, strict=True)
        y = functools.reduce(torch.add, (F.linear(a, w).to(torch.float32) * s for a, w, s in parts))
        y = y * picked(scale, row_in, rank)  # type: ignore[arg-type]
    else:
        y = scaled(F.linear(x, weight.to(torch.float64)), scale, row_in, weight_scale)
    if low is not None and up is not None:
        y = y + low.to(torch.float32) @ up.to(torch.float32)
    if bias is not None:
        y = y + along(bias, rank, rank - 1)
    return ending(y, rank - 1, act, gate, residual, row, out_scale, out_zero_point, out)


@_define(
    f"qconv({_INPUT}, Tensor weight, Tensor weight_scale, Tensor? bias=None, int stride=1, int padding=0,"
    f" int groups=1, {ENDING}) -> Tensor"
)
def qconv(
    codes: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    row_in: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    *end: Any,
    **named: Any,
) -> Tensor:
    """codes u8 [B, C, H, W], weight int8 [N, C / groups, kh, kw]; else as `qlinear`. Padding is the zero point."""
    if weight_scale.dim() > 1:  # kernels of 1 x 1 only
        flat = (codes.movedim(1, -1), scale, zero_point, row_in, weight.flatten(1), weight_scale, None)
        y = qlinear(*flat, "none", None, None, None, None, None, "f32").movedim(-1, 1)
    else:
        acc = F.conv2d(centred(codes, zero_point, row_in), weight.to(torch.float64), None, stride, padding, 1, groups)
        y = scaled(acc, scale, row_in, weight_scale[:, None, None])
    if bias is not None:
        y = y + along(bias, 4, 1)
    return ending(y, 1, *end, **named)


@_define(
    'norm(Tensor x, int groups, Tensor? weight=None, Tensor? bias=None, float eps=1e-05, str act="none",'
    f" {_STORED}) -> Tensor"
)
def norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
) -> Tensor:
    """Group norm of [B, C, ...], or with groups = 0 layer norm over the last dimension; then the ending."""
    x = x.to(torch.float32)
    channel = 1 if groups else x.dim() - 1
    y = F.group_norm(x, groups, None, None, eps) if groups else F.layer_norm(x, x.shape[-1:], None, None, eps)
    if weight is not None:
        y = y * along(weight, x.dim(), channel)
    if bias is not None:
        y = y + along(bias, x.dim(), channel)
    return ending(y, channel, act, None, None, row, out_scale, out_zero_point, out)


@_define(
    f'map(Tensor x, str act="none", {_STORED}) -> Tensor',
)
def map(
    x: Tensor,
    act: str = "none",
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
) -> Tensor:
    """An activation over the last dimension (geglu halves it), then the ending."""
    y = x.to(torch.float32)
    return ending(y, x.dim() - 1, act, None, None, row, out_scale, out_zero_point, out)


@_define(
    f"gated_add(Tensor x, Tensor? gate=None, Tensor? residual=None, {_STORED}) -> Tensor",
)
def gated_add(
    x: Tensor,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
) -> Tensor:
    """x * gate + residual, channels last; then the ending."""
    y = x.to(torch.float32)
    return ending(y, x.dim() - 1, "none", gate, residual, row, out_scale, out_zero_point, out)


@_define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str mode, {_STORED}) -> Tensor",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    mode: str,
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
) -> Tensor:
    """softmax(q k^T * scale + mask) v for q [B, H, S, D], k and v [B, H, S', D]; f32 here, in every mode."""
    y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, scale=scale)
    return ending(y, 3, "none", None, None, row, out_scale, out_zero_point, out)


@_define("quantize_tokens(Tensor x, int bits=8) -> (Tensor, Tensor, Tensor)")
def quantize_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u8 of x [..., C], scale f32 and zero point i32 [...] of each token: asymmetric, found at run time.

    The scale of a token with a NaN or an infinity is NaN, so that all that is made of it is; its codes are 0.
    """
    top = 2**bits - 1
    x = x.to(torch.float32)
    low = x.amin(-1).clamp(max=0)
    high = x.amax(-1).clamp(min=0)
    odd = (x * 0).sum(-1)
    scale = ((high - low + odd) / top).clamp(min=torch.finfo(torch.float32).eps)
    zero_point = torch.round(-low / scale).nan_to_num(0)
    codes = torch.clamp(torch.round(x * (1.0 / scale)[..., None]) + zero_point[..., None], 0, top).nan_to_num(0)
    return codes.to(torch.uint8), scale, zero_point.to(torch.int32)


@_define("channels_last(Tensor x) -> Tensor")
def channels_last(x: Tensor) -> Tensor:
    """x [B, C, H, W] with its channels next to each other in memory."""
    return x.clone(memory_format=torch.channels_last)


@_define("plain(Tensor x) -> Tensor")
def plain(x: Tensor) -> Tensor:
    """x in f32 and in the order of its dimensions, as callers of the model want it."""
    return x.to(torch.float32).clone(memory_format=torch.contiguous_format)


def centred(codes: Tensor, zero_point: Tensor | None, row: Tensor | None) -> Tensor:
    """What is multiplied, in f64: sums of products of codes are exact there."""
    x = codes.to(torch.float64)
    return x if zero_point is None else x - picked(zero_point, row, codes.dim())


def scaled(acc: Tensor, scale: Tensor | None, row: Tensor | None, weight_scale: Tensor) -> Tensor:
    """Sums as values in f32."""
    return acc.to(torch.float32) * (weight_scale if scale is None else picked(scale, row, acc.dim()) * weight_scale)


def picked(parameter: Tensor, row: Tensor | None, rank: int) -> Tensor:
    """Parameters [1] or [T], or one for each token, shaped to broadcast against a tensor of `rank` dimensions."""
    if parameter.dim() == rank - 1 and rank > 2:  # of each token
        return parameter[..., None]
    chosen = parameter if row is None or parameter.shape[0] == 1 else parameter[row]
    return chosen.reshape(-1, *[1] * (rank - 1)) if chosen.numel() > 1 else chosen.reshape(())


def along(parameter: Tensor, rank: int, channel: int) -> Tensor:
    """Parameters [C] or [R, ..., C], shaped to broadcast along dimension `channel` of a tensor of `rank` dimensions."""
    shape = [1] * rank
    shape[0] = parameter.shape[0] if parameter.dim() > 1 else 1
    shape[channel] = parameter.shape[-1]
    return parameter.reshape(shape)


def ending(
    y: Tensor,
    channel: int,
    act: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    row: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out: str = "f32",
) -> Tensor:
    """What follows a fused operation's own result (see above)."""
    y = activate(y, act)
    if gate is not None:
        y = y * along(gate, y.dim(), channel)
    if residual is not None:
        y = y + residual.to(torch.float32)
    if out in CODES:
        assert out_scale is not None and out_zero_point is not None
        return quantize(y, out_scale, out_zero_point, row if out_scale.shape[0] > 1 else None, 0, CODES[out])
    return y.to(_FLOATS[out])


def activate(y: Tensor, act: str) -> Tensor:
    """One of none, silu, gelu, gelu_tanh and geglu, which takes values and gates side by side in the last dimension."""
    match act:
        case "silu":
            return F.silu(y)
        case "gelu":
            return F.gelu(y)
        case "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        case "geglu":
            value, gate = y.chunk(2, -1)
            return value * F.gelu(gate)
        case _:
            return y
