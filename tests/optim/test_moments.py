"""Moments in few bits: within a step of what they were, right on average, and nothing is divided by zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tfqc.optim.moments import BLOCK, Linear, Logarithmic, factors

WIDE = torch.randn(40, 50, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 3, 40)[:, None]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_block(values: Tensor) -> Tensor:
    return values.view(-1)[: values.numel() // BLOCK * BLOCK].view(-1, BLOCK)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_linear_is_within_a_step(bits: int) -> None:
    kept = Linear.of(WIDE, bits, generator())
    step = per_block(WIDE).abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1) * 1.01
    assert kept.codes.shape == (2048 // 8, bits) and kept.scale.dtype is torch.bfloat16
    assert bool((per_block(kept.values(WIDE) - WIDE).abs() <= step).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_logarithmic_is_within_a_step(bits: int) -> None:
    values = WIDE.square()
    octaves = (per_block(values).amax(1) / per_block(values).amin(1)).log2().clamp_max(60)[:, None]
    off = per_block((Logarithmic.of(values, bits, generator()).values(WIDE) / values).log2().abs())
    assert bool((off <= (octaves / (2**bits - 1)).clamp_min(1 / 16) + 0.1).all())


@pytest.mark.parametrize("grid", [Linear, Logarithmic])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_mean_is_kept(grid: type[Linear | Logarithmic], bits: int) -> None:
    """Of 400 roundings of a block, which are off by up to a step each."""
    values = torch.rand(BLOCK, generator=generator(1)) + 0.01
    made = torch.stack([grid.of(values, bits, generator(n)).values(values) for n in range(400)])
    assert float((made[0] - values).abs().max()) > 10 * float((made.mean(0) - values).abs().mean())
    assert abs(float((made.mean(0) - values).sum())) < 0.02 * float((made[0] - values).abs().sum())


def test_zeros_are_zeros() -> None:
    for grid in (Linear, Logarithmic):
        assert torch.equal(grid.of(torch.zeros(300), 4, generator()).values(torch.empty(300)), torch.zeros(300))


def test_what_is_not_zero_does_not_become_it() -> None:
    """A second moment of zero would divide by eps."""
    values = torch.tensor([1e-8, 1.0, 0.0, *[0.5] * 125])
    assert bool((Logarithmic.of(values, 3, generator()).values(values) > 0).all())


def test_the_same_generator_the_same_codes() -> None:
    assert torch.equal(Linear.of(WIDE, 4, generator(3)).codes, Linear.of(WIDE, 4, generator(3)).codes)
    assert not torch.equal(Linear.of(WIDE, 4, generator(3)).codes, Linear.of(WIDE, 4, generator(4)).codes)


def test_factors() -> None:
    flat = torch.full((256,), 2.0)
    its = factors(flat, flat, flat)
    assert (its.rms, its.dispersion, its.spread) == (2.0, 1.0, 0.0)
    peaked = torch.tensor([8.0, *[0.0] * 127] * 2)
    assert factors(flat, peaked, flat).dispersion == pytest.approx(128**0.5)
    assert factors(flat, flat, torch.tensor([16.0, *[1.0] * 127] * 2)).spread == 4.0
