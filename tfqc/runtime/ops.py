"""The operations that tfqc adds to ATen: tables of rows, quantized weights and activations.

They are compositions of ATen ones (`CompositeImplicitAutograd`), so that they run on every device,
on the meta device, and under autograd, with no kernel of their own. A backend replaces them by real kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("tfqc", "DEF")


def _define(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(schema)
        _LIBRARY.impl(schema.split("(")[0], function, "CompositeImplicitAutograd")
        return function

    return register


def _rows(parameter: Tensor, row: Tensor | None, rank: int) -> Tensor:
    """Parameters [T] at `row` [R], shaped to broadcast against a tensor of `rank` dimensions, the first R or B."""
    picked = parameter if row is None else parameter[row]
    return picked.reshape(-1, *[1] * (rank - 1)) if picked.numel() > 1 else picked.reshape(())


@_define("table_read(Tensor table, Tensor row) -> Tensor")
def table_read(table: Tensor, row: Tensor) -> Tensor:
    """Rows `row` [R] of a compile-time table [T, ...]: [R, ...]."""
    return table.index_select(0, row)


@_define("table_decode(Tensor codes, Tensor scale, Tensor zero_point, Tensor row) -> Tensor")
def table_decode(codes: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor) -> Tensor:
    """Rows of a quantized table: codes int8 [T, ...], scale f32 [T], zero point i32 [T]; f32 [R, ...]."""
    shape = (-1, *[1] * (codes.dim() - 1))
    centred = codes.index_select(0, row).to(torch.float32) - zero_point[row].reshape(shape)
    return centred * scale[row].reshape(shape)


@_define("table_decode_int4(Tensor packed, Tensor scale, Tensor zero_point, Tensor row, int[] shape) -> Tensor")
def table_decode_int4(packed: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor, shape: list[int]) -> Tensor:
    """Rows of a 4-bit table: packed u8 [T, ceil(n/2)], low nibble first, codes 0..15; f32 [R, *shape]."""
    picked = packed.index_select(0, row)
    codes = torch.stack([picked & 15, picked >> 4], dim=-1).flatten(1)
    size = 1
    for extent in shape:
        size *= extent
    centred = codes[:, :size].to(torch.float32) - zero_point[row].reshape(-1, 1)
    return (centred * scale[row].reshape(-1, 1)).reshape(-1, *shape)


@_define("request_read(Tensor table, Tensor row) -> Tensor")
def request_read(table: Tensor, row: Tensor) -> Tensor:
    """Rows of a request-time table [T, B, ...]: row [1] gives [B, ...]; row [B] gives row b of batch entry b."""
    if row.shape[0] == 1:
        return table.index_select(0, row).squeeze(0)
    return table[row, torch.arange(row.shape[0], device=row.device)]


@_define(
    "conv2d_rows(Tensor input, Tensor weight, Tensor bias, int[] stride, int[] padding, int[] dilation, int groups)"
    " -> Tensor"
)
def conv2d_rows(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Convolution whose bias [R, O] is a row of the schedule: one for the batch (R = 1) or one for each entry."""
    if bias.shape[0] == 1:
        return F.conv2d(input, weight, bias[0], stride, padding, dilation, groups)
    return F.conv2d(input, weight, None, stride, padding, dilation, groups) + bias[:, :, None, None]


@_define("group_norm_rows(Tensor input, int groups, Tensor weight, Tensor bias, float eps) -> Tensor")
def group_norm_rows(input: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm of [B, C, ...] whose affine weight and bias [R, C] are rows of the schedule."""
    if weight.shape[0] == 1 and bias.shape[0] == 1:
        return F.group_norm(input, groups, weight[0], bias[0], eps)
    shape = (-1, input.shape[1], *[1] * (input.dim() - 2))
    return F.group_norm(input, groups, None, None, eps) * weight.reshape(shape) + bias.reshape(shape)


@_define("layer_norm_rows(Tensor input, int[] shape, Tensor weight, Tensor bias, float eps) -> Tensor")
def layer_norm_rows(input: Tensor, shape: list[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm of [B, S, C] whose affine weight and bias [R, C] are rows of the schedule."""
    if weight.shape[0] == 1 and bias.shape[0] == 1:
        return F.layer_norm(input, shape, weight[0], bias[0], eps)
    return F.layer_norm(input, shape, None, None, eps) * weight[:, None, :] + bias[:, None, :]


@_define("quantize(Tensor x, Tensor scale, Tensor zero_point, Tensor? row, int qmin, int qmax) -> Tensor")
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """Integers clamp(round(x * (1 / s)) + z) as int8 or uint8; s, z are [1], or [T] rows picked by `row` [R]."""
    inverse = 1.0 / _rows(scale, row, x.dim())
    codes = torch.clamp(torch.round(x * inverse) + _rows(zero_point, row, x.dim()), qmin, qmax)
    return codes.to(torch.int8 if qmin < 0 else torch.uint8)


@_define("quantize_dynamic(Tensor x, int bits) -> Tensor")
def quantize_dynamic(x: Tensor, bits: int) -> Tensor:
    """x fake-quantized with one asymmetric scale for each token (row of the last dimension), found at run time."""
    low = x.amin(-1, keepdim=True).clamp(max=0)
    high = x.amax(-1, keepdim=True).clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).eps)
    zero_point = torch.round(-low / scale)
    return (torch.clamp(torch.round(x * (1.0 / scale)) + zero_point, 0, top) - zero_point) * scale


@_define("dequantize(Tensor codes, Tensor scale, Tensor zero_point, Tensor? row) -> Tensor")
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None) -> Tensor:
    """(q - z) * s in f32; s, z as in `quantize`."""
    rank = codes.dim()
    return (codes.to(torch.float32) - _rows(zero_point, row, rank)) * _rows(scale, row, rank)


@_define("dequantize_weight(Tensor codes, Tensor scale, Tensor zero_point, int group) -> Tensor")
def dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Tensor:
    """Weight [O, ...] in f32 from int8 codes; scale, zero point [O, G], one for each `group` of the flattened row."""
    flat = codes.reshape(codes.shape[0], -1).to(torch.float32)
    width = flat.shape[1]
    wide_scale = scale.repeat_interleave(group, 1)[:, :width]
    wide_zero = zero_point.repeat_interleave(group, 1)[:, :width]
    return ((flat - wide_zero) * wide_scale).reshape(codes.shape)


@_define("dequantize_weight_int4(Tensor packed, Tensor scale, Tensor zero_point, int group, int[] shape) -> Tensor")
def dequantize_weight_int4(packed: Tensor, scale: Tensor, zero_point: Tensor, group: int, shape: list[int]) -> Tensor:
    """As `dequantize_weight`, from flat u8 with two signed 4-bit codes a byte, low nibble first."""
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten().to(torch.int8)
    size = 1
    for extent in shape:
        size *= extent
    codes = ((nibbles[:size] ^ 8) - 8).reshape(shape)
    return dequantize_weight(codes, scale, zero_point, group)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """dequantize(quantize(x)), bit for bit: clamping the centred grid saves adding z and taking it away.

    Four sweeps of plain arithmetic take about half the time of torch.fake_quantize_per_tensor_affine on a CPU.
    """
    s, z = (scale, zero_point) if row is None else (scale[row], zero_point[row])
    shape = () if s.numel() == 1 else (-1, *[1] * (x.dim() - 1))
    s, z = s.reshape(shape), z.reshape(shape).to(torch.float32)
    return (x * (1.0 / s)).round_().clamp_(qmin - z, qmax - z).mul_(s)
