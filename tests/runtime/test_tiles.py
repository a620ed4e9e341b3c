"""tfqc.runtime.tiles: every code has one place, whatever the shape."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.runtime.packing import pack_int4
from tfqc.runtime.tiles import columns, pack, sums, tiles_shape, unpack

linears = st.tuples(st.integers(1, 40), st.integers(1, 140))
pairs = st.tuples(st.integers(1, 3).map(lambda n: 32 * n), st.integers(1, 140))
images = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3))
bits = st.sampled_from([4, 8])
quick = settings(deadline=None, max_examples=40)


def codes_of(shape: tuple[int, ...], width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape))
    low, high = (-8, 8) if width == 4 else (-128, 128)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)


def check(shape: tuple[int, ...], groups: int, paired: bool, width: int) -> None:
    codes = codes_of(shape, width)
    tiles = pack(codes, groups, paired)
    assert tiles.shape == tiles_shape(shape, groups) and tiles.is_contiguous()
    assert int((tiles != 0).sum()) == int((codes != 0).sum())  # the rest is 0
    stored = pack_int4(tiles) if width == 4 else tiles
    assert torch.equal(unpack(stored, shape, groups, paired, width), codes)
    flat = codes.flatten(1).sum(1, dtype=torch.int32)
    assert torch.equal(sums(codes, groups, paired), columns(flat, groups, paired))
    # Sums stand where the kernels' columns do.
    found = tiles.reshape(groups, *tiles.shape[-5:]).to(torch.int32).sum((2, 3, 5)).flatten()
    assert torch.equal(sums(codes, groups, paired), found)


@quick
@given(linears, bits)
def test_linears(shape: tuple[int, int], width: int) -> None:
    check(shape, 1, False, width)


@quick
@given(pairs, bits)
def test_values_and_gates(shape: tuple[int, int], width: int) -> None:
    check(shape, 1, True, width)


@quick
@given(images, bits)
def test_convolutions(shape: tuple[int, ...], width: int) -> None:
    groups, each, *rest = shape
    check((groups * each, *rest), groups, False, width)


@quick
@given(linears)
def test_where_a_code_lies(shape: tuple[int, int]) -> None:
    """Output n and input k: block n / 16, block k / 64, group of 4 inputs, output within, input within."""
    codes = codes_of(shape, 8)
    tiles = pack(codes)
    n, k = shape[0] - 1, shape[1] - 1
    assert tiles[n // 16, k // 64, k % 64 // 4, n % 16, k % 4] == codes[n, k]


def test_columns_of_pairs() -> None:
    order = columns(torch.arange(64), paired=True).reshape(4, 16)[:, 0]
    assert order.tolist() == [0, 32, 16, 48]
    padded = columns(torch.arange(1, 7), groups=2)
    assert padded.tolist() == [1, 2, 3, *[0] * 13, 4, 5, 6, *[0] * 13]
