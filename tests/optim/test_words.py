"""Codes come back as they were, in as many bits as they have."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tfqc.optim.words import pack, unpack


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 2**32))
def test_they_come_back(bits: int, groups: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (8 * groups,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype is torch.uint8 and packed.shape == (groups, bits)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_first_code_is_the_lowest_bits(bits: int) -> None:
    codes = torch.tensor([2**bits - 1, *[0] * 7])
    assert int.from_bytes(bytes(pack(codes, bits)[0].tolist()), "little") == 2**bits - 1
