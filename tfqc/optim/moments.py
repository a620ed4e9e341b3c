"""Moments of a gradient in few bits: the first on a linear grid, the second on a logarithmic one, block by block.

Both are rounded at random to one of the two neighbours, so that the mean is kept: an average that moves by a
thousandth of itself at each step would never leave its code if it were rounded to the nearest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tfqc.optim.allocation import Factors
from tfqc.optim.words import pack, unpack

BLOCK = 128  # values that share a scale
_FLOOR = 2.0**-60  # of a block's largest value: what a logarithmic grid takes for zero
_FINE = 16  # steps of a logarithmic grid are sixteenths of an octave


@dataclass(frozen=True)
class Linear:
    """Signed values: s · (c − (2^(bits−1) − 1)).

    codes: uint8 [n / 8, bits]; scale: bfloat16 [n / 128], of n values padded to whole blocks.
    """

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, values: Tensor, bits: int, generator: torch.Generator) -> Linear:
        """Of float32 values of any shape."""
        blocks, top = _blocks(values), 2 ** (bits - 1) - 1
        scale = _upwards(blocks.abs().amax(1) / top)
        steps = blocks / torch.where(scale == 0, 1, scale.float())[:, None]
        codes = (steps + _noise(steps, generator)).floor().clamp_(-top, top) + top
        return cls(pack(codes.long().view(-1), bits), scale)

    def values(self, like: Tensor) -> Tensor:
        """float32, in the shape of `like`."""
        bits = self.codes.shape[1]
        steps = unpack(self.codes, bits) - (2 ** (bits - 1) - 1)
        return _shaped(steps.view(-1, BLOCK) * self.scale.float()[:, None], like)


@dataclass(frozen=True)
class Logarithmic:
    """Values that are not negative: s · 2^(−c · step / 16); nothing but blocks of zeros becomes zero.

    codes: uint8 [n / 8, bits]; scale: bfloat16 [n / 128], the largest of a block; step: uint8 [n / 128], such that the
    grid reaches from there to the smallest.
    """

    codes: Tensor
    scale: Tensor
    step: Tensor

    @classmethod
    def of(cls, values: Tensor, bits: int, generator: torch.Generator) -> Logarithmic:
        """Of float32 values ≥ 0 of any shape."""
        blocks, last = _blocks(values), 2**bits - 1
        scale = _upwards(blocks.amax(1))
        whole = torch.where(scale == 0, 1, scale.float())[:, None]
        below = -(blocks / whole).clamp_(_FLOOR, 1).log2_()  # octaves below the largest
        step = (below.amax(1) * _FINE / last).ceil_().clamp_(1, 255)
        octaves = step[:, None] / _FINE
        upper = (below / octaves).floor_().clamp_(max=last - 1)
        high, low = (-upper * octaves).exp2_(), (-(upper + 1) * octaves).exp2_()
        down = (blocks / whole - low) / (high - low) < _noise(blocks, generator)
        codes = upper + down
        return cls(pack(codes.long().view(-1), bits), scale, step.to(torch.uint8))

    def values(self, like: Tensor) -> Tensor:
        """float32, in the shape of `like`."""
        codes = unpack(self.codes, self.codes.shape[1]).view(-1, BLOCK)
        octaves = self.step.float()[:, None] / _FINE
        return _shaped((-codes * octaves).exp2_() * self.scale.float()[:, None], like)


def factors(grad: Tensor, first: Tensor, second: Tensor) -> Factors:
    """What the allocation asks of a layer: its gradient and both moments, in float32."""
    m, v = _blocks(first), _blocks(second)
    largest = v.amax(1).clamp_min(1e-45)
    reach = (largest / v.amin(1).clamp_min(1e-45).maximum(largest * _FLOOR)).log2()
    filled = m.abs().amax(1) / m.square().mean(1).sqrt().clamp_min(1e-30)
    return Factors(float(grad.square().mean().sqrt()), float(filled.mean()), float(reach.mean()))


def _blocks(values: Tensor) -> Tensor:
    """[blocks, 128]; the last is filled with copies of the last value, which widen no grid."""
    flat = values.reshape(1, -1)
    return F.pad(flat, (0, -flat.numel() % BLOCK), mode="replicate").view(-1, BLOCK)


def _shaped(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.view(-1)[: like.numel()].view(like.shape)


def _upwards(scale: Tensor) -> Tensor:
    """bfloat16, not below float32: no value is then beyond its grid."""
    rounded = scale.bfloat16()
    return torch.where(rounded.float() < scale, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32)
