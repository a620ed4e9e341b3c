"""What kernels compute, with torch: the same arguments, the same bytes but for rounding in activations.

It runs where there is no CUDA device, and says what stored test vectors have to be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Kernel, Quantize, Rows
from tfqc.runtime.kernel_ops import CODES, activate, quantize_tokens

Given = Mapping[str, Tensor | None]


def launch(kernel: Kernel, rows: int, given: Given) -> None:
    """Run a kernel on tensors by the names of its arguments; what it writes is among them."""
    if isinstance(kernel, Gemm):
        _product(kernel, rows, given)
    elif kernel.bits == 16:
        _some(given, "out").copy_(_bordered(kernel, F.pad(_some(given, "x"), (0, -kernel.k % 32)), 0))
    elif kernel.scales == "token":
        _tokens(kernel, given)
    else:
        _values(kernel, given)


def _product(kernel: Gemm, rows: int, given: Given) -> None:
    end, step = kernel.epilogue, int(_some(given, "step"))
    a = _rows(kernel, rows, _some(given, "a"))
    weight = pack.unpack(_some(given, "weight"), kernel.n, kernel.k, kernel.mode, kernel.paired)
    order, out = _order(kernel), _some(given, "out")
    if end.out == "s32":
        out.copy_(_sums(a, weight, _zeros(kernel, given, step)).to(torch.int32).reshape(out.shape))
        return
    y = _scaled(kernel, given, a, weight, order, step)
    if end.rank:
        up = pack.unpack_up(_some(given, "up"), kernel.n, end.rank, kernel.paired)
        y = y + _some(given, "low").reshape(rows, end.rank).to(torch.float32) @ up.to(torch.float32).T
    if end.bias != "none":
        y = y + _some(given, "bias").reshape(-1, kernel.padded_n)[step if end.bias == "step" else 0, order]
    y = activate(y, end.activation)
    if end.residual:
        y = y + _some(given, "residual").reshape(y.shape).to(torch.float32)
    if end.out == "f16":
        out.copy_(y.to(torch.float16).reshape(out.shape))
    else:
        inverse, origin = (_picked(given[name], end.out_scales, step) for name in ("out_inverse", "out_zero"))
        out.copy_(_stored(_quantized(y, inverse, origin, CODES[end.out]), origin, end.out == "u4").reshape(out.shape))


def _scaled(kernel: Gemm, given: Given, a: Tensor, weight: Tensor, order: Tensor, step: int) -> Tensor:
    """The product in f32, times its scales."""
    scales = _some(given, "weight_scale").reshape(-1, kernel.padded_n)[:, order]
    zero = _zeros(kernel, given, step)
    scale = None if zero is None else _picked(given["scale"], kernel.epilogue.scales, step)[:, None]
    if kernel.group is None:
        acc = _sums(a, weight, zero).to(torch.float32)
        return acc * (scales[0] if scale is None else scale * scales[0])
    if scale is None:
        wide = scales.repeat_interleave(kernel.group, 0)[: kernel.k].T
        return _sums(a, weight * wide, None).to(torch.float32)
    parts = zip(a.split(kernel.group, 1), weight.split(kernel.group, 1), scales, strict=False)
    y = functools.reduce(torch.add, (_sums(x, w, zero).to(torch.float32) * s for x, w, s in parts))
    return y * scale


def _zeros(kernel: Gemm, given: Given, step: int) -> Tensor | None:
    """Zero points of the rows of codes; None of values."""
    if kernel.mode == "w4a16":
        return None
    return _picked(given["zero"], kernel.epilogue.scales, step)[:, None]


def _sums(a: Tensor, weight: Tensor, zero: Tensor | None) -> Tensor:
    """Products of rows, in f64: those of codes are exact."""
    wide = a.to(torch.float64)
    return (wide if zero is None else wide - zero) @ weight.to(torch.float64).T


def _rows(kernel: Gemm, rows: int, a: Tensor) -> Tensor:
    """A product's left operand [M, K], of a convolution its windows."""
    codes = _apart(a) if kernel.a_bits == 4 else a
    window = kernel.window
    if window is None:
        return codes.reshape(rows, kernel.k)
    image = codes.reshape(-1, window.height + 2, window.width + 2, kernel.k // 9)
    seen = image.unfold(1, 3, window.stride).unfold(2, 3, window.stride)  # B, y, x, C, 3, 3
    return seen.permute(0, 1, 2, 4, 5, 3).reshape(rows, kernel.k)


def _values(kernel: Quantize, given: Given) -> None:
    step, out, x = int(_some(given, "step")), _some(given, "out"), _some(given, "x")
    inverse, zero = (_picked(given[name], kernel.scales, step) for name in ("inverse", "zero"))
    codes = _quantized(x.to(torch.float32), inverse, zero, 2**kernel.bits - 1)
    out.copy_(_stored(_bordered(kernel, codes, int(zero)), zero, kernel.bits == 4).reshape(out.shape))
    if kernel.rank:
        down = pack.unpack_down(_some(given, "down"), kernel.k, kernel.rank)
        low = _some(given, "low")
        low.copy_((x.to(torch.float32) @ down.to(torch.float32)).to(torch.float16).reshape(low.shape))


def _bordered(kernel: Quantize, rows: Tensor, value: int) -> Tensor:
    """Rows as they are, or images with a border of `value`."""
    if kernel.image is None:
        return rows
    images = rows.reshape(-1, *kernel.image, rows.shape[-1]).permute(0, 3, 1, 2)
    return F.pad(images, (1, 1, 1, 1), value=value).permute(0, 2, 3, 1)


def _tokens(kernel: Quantize, given: Given) -> None:
    out, scale, zero = (_some(given, name) for name in ("out", "scale", "zero"))
    codes, scales, zeros = quantize_tokens(_some(given, "x"), kernel.bits)
    scale.copy_(scales.reshape(scale.shape))
    zero.copy_(zeros.reshape(zero.shape))
    padded = torch.cat([codes, zeros[..., None].expand(*zeros.shape, -kernel.k % 32).to(torch.uint8)], -1)
    out.copy_((_together(padded) if kernel.bits == 4 else padded).reshape(out.shape))


def _quantized(y: Tensor, inverse: Tensor, zero: Tensor, top: int) -> Tensor:
    """clamp(rint(y * inverse) + zero, 0, top)"""
    return torch.clamp(torch.round(y * inverse) + zero, 0, top).to(torch.uint8)


def _stored(codes: Tensor, zero: Tensor, narrow: bool) -> Tensor:
    """Rows padded to 32 codes with the code of 0; 4-bit ones two a byte."""
    padded = F.pad(codes, (0, -codes.shape[-1] % 32), value=int(zero))
    return _together(padded) if narrow else padded


def _together(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _apart(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _order(kernel: Gemm) -> Tensor:
    """Where kernels have the columns 0 .. n - 1 of a product."""
    numbers = pack.columns(torch.arange(1, kernel.n + 1), kernel.tile.n, kernel.paired)
    places = torch.empty(kernel.n + 1, dtype=torch.int64)
    places[numbers] = torch.arange(len(numbers))
    return places[1:]


def _picked(parameter: Tensor | None, rows: Rows, step: int) -> Tensor:
    """One parameter, that of the step, or those of all tokens: [1] or [M]."""
    assert parameter is not None
    flat = parameter.flatten()
    return flat if rows == "token" else flat[[step if rows == "step" else 0]]


def _some(given: Given, name: str) -> Tensor:
    value = given[name]
    assert value is not None
    return value
