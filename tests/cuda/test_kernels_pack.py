"""Packed weights: every code has one place, and it is the one that the PTX manual's fragments say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ptx import layouts
from tfqc.backends.cuda_int4.runtime.pack import (
    Mode,
    columns,
    pack,
    pack_down,
    pack_up,
    unpack,
    weight_sums,
    window_codes,
)

MODES: tuple[Mode, ...] = ("w4a4", "w4a8", "w4a16")
modes = st.sampled_from(MODES)
tiles = st.sampled_from([32, 64, 128])
quick = settings(deadline=None, max_examples=60)


def codes_of(n: int, k: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)


@quick
@given(n=st.integers(1, 300), k=st.integers(1, 200), mode=modes, tile_n=tiles, seed=st.integers(0, 9))
def test_unpack_is_the_inverse(n: int, k: int, mode: Mode, tile_n: int, seed: int) -> None:
    codes = codes_of(n, k, seed)
    packed = pack(codes, mode, tile_n)
    padded = -(-n // tile_n) * tile_n
    columns_, inputs = (32, 32) if mode == "w4a16" else (16, 64)
    assert packed.shape == (padded // columns_, -(-k // inputs), 32, 16) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, n, k, mode), codes)


@quick
@given(half=st.integers(1, 150), k=st.integers(1, 200), mode=modes, tile_n=tiles)
def test_unpack_is_the_inverse_for_values_and_gates(half: int, k: int, mode: Mode, tile_n: int) -> None:
    codes = codes_of(2 * half, k)
    assert torch.equal(unpack(pack(codes, mode, tile_n, paired=True), 2 * half, k, mode, paired=True), codes)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_codes_lie_where_the_instruction_takes_them_from(mode: Mode, paired: bool) -> None:
    """By the fragment tables of the PTX manual: B of m16n8k64 (.s4), of m16n8k32 (.s8), and of m16n8k16 (.f16)."""
    n, k = 64, 128
    codes = codes_of(n, k)
    packed = pack(codes, mode, 64, paired)
    for warp in range(n // 32):
        for block in range(4):
            for lane in range(32):
                group, thread = lane >> 2, lane % 4  # groupID and threadID_in_group, as the manual calls them
                # Accumulators c0, c1 of thread `group // 2` are columns `group`: eight neighbours from four blocks.
                owner, which = group // 2, group % 2
                if paired:  # 4 values of this thread, and their gates half of all columns further
                    column = warp * 16 + owner * 4 + block % 2 * 2 + which + (n // 2 if block >= 2 else 0)
                else:
                    column = warp * 32 + owner * 8 + block * 2 + which
                if mode == "w4a16":
                    for i in range(4 * k // 16):  # b_i, i % 4: row = thread * 2 + (i & 1), + 8 for the second register
                        row = i // 4 * 16 + thread * 2 + (i & 1) + (8 if i % 4 >= 2 else 0)
                        unit, which_instruction = i // 8, i // 4 % 2
                        mine = int.from_bytes(packed[warp, unit, lane, block * 4 : block * 4 + 4].tolist(), "little")
                        # (x >> 8 * instruction) & 0x000F000F, or & 0x00F000F0: codes 16 bits apart are a pair
                        nibble = mine >> 8 * which_instruction + (4 if i % 4 >= 2 else 0) + 16 * (i & 1) & 15
                        assert (nibble ^ 8) - 8 == codes[column, row]
                    continue
                for unit in range(k // 64):
                    mine = packed[warp * 2 + block // 2, unit, lane, block % 2 * 8 : block % 2 * 8 + 8]
                    for i in range(16):
                        if mode == "w4a4":  # b_i: row = thread * 8 + (i & 7), + 32 for the second register
                            row, byte, high = thread * 8 + (i & 7) + (32 if i >= 8 else 0), i // 2, i % 2
                        else:  # b_j, j = i % 8: row = thread * 4 + (j & 3), + 16 for the second register
                            j = i % 8
                            row, byte, high = thread * 4 + (j & 3) + (16 if j >= 4 else 0) + i // 8 * 32, j, i // 8
                        nibble = int(mine[byte]) >> 4 * high & 15
                        assert (nibble ^ 8) - 8 == codes[column, unit * 64 + row]


@quick
@given(n=st.integers(1, 200), tile_n=tiles)
def test_columns_are_padded_and_paired_ones_lie_in_sixteens(n: int, tile_n: int) -> None:
    values = torch.arange(1.0, 2 * n + 1).reshape(1, -1)
    plain = columns(values, tile_n)
    assert plain.shape[1] % tile_n == 0
    assert torch.equal(plain[:, : 2 * n], values) and not plain[:, 2 * n :].any()
    paired = columns(values, tile_n, paired=True).reshape(-1, 2, 16)
    assert paired.numel() == plain.numel()
    assert torch.equal(paired[:, 0].flatten()[:n], values[0, :n])
    assert torch.equal(paired[:, 1].flatten()[:n], values[0, n:])
    assert paired.count_nonzero() == 2 * n


def test_weight_sums_are_those_of_the_columns() -> None:
    codes = codes_of(40, 70)
    assert torch.equal(weight_sums(codes, 64)[:40], codes.sum(1, dtype=torch.int32))
    assert torch.equal(weight_sums(codes, 64, True), columns(codes.sum(1, dtype=torch.int32), 64, True))


def test_weight_sums_of_groups_are_those_of_their_inputs() -> None:
    codes = codes_of(40, 300)
    sums = weight_sums(codes, 64, group=128)
    assert sums.shape == (3, 64) and sums.dtype == torch.int32
    for group, its in enumerate(codes.split(128, 1)):
        assert torch.equal(sums[group], weight_sums(its, 64))


HALF_B = layouts.MMA["m16n8k16", 16].b


@pytest.mark.parametrize("paired", [False, True])
def test_a_low_ranks_second_factor_lies_as_its_first_is_read(paired: bool) -> None:
    """Row k of B is the rank that a thread has in column k of A when it reads four neighbours of low as a0 and a2."""
    rank, n = 32, 64
    up = torch.randn(n, rank).half()
    packed = pack_up(up, 64, paired)
    assert packed.shape == (2, 2, 2, 32, 8)
    ordered = columns(up.T.contiguous(), 64, paired).T  # as the columns of accumulators
    for lane in range(32):
        for block in range(4):
            for i in range(4):
                row, column = HALF_B.at(lane, i)
                read = row % 8 // 2 * 4 + row // 8 * 2 + row % 2  # thread row % 8 / 2 has a0 and then a2
                mine = packed[:, :, block // 2, lane, block % 2 * 4 + i]
                place = (
                    16 * (block // 2) + 4 * (column // 2) + 2 * (block % 2) if paired else 8 * (column // 2) + 2 * block
                )
                for warp in range(2):
                    for step in range(2):
                        assert mine[warp, step] == ordered[warp * 32 + place + column % 2, step * 16 + read]


def test_a_low_ranks_first_factor_lies_as_values_are_read() -> None:
    """A thread reads eight neighbours of a row: a0 and a2 of one instruction, then of the other."""
    k, rank = 70, 16
    down = torch.randn(k, rank).half()
    packed = pack_down(down)
    assert packed.shape == (3, 2, 32, 8)
    whole = torch.zeros(96, rank).half()
    whole[:k] = down
    for lane in range(32):
        for i in range(8):
            row, column = HALF_B.at(lane, i % 4)
            read = row % 8 // 2 * 8 + i // 4 * 4 + row // 8 * 2 + row % 2
            for part in range(3):
                for block in range(2):
                    assert packed[part, block, lane, i] == whole[part * 32 + read, block * 8 + column]


def test_a_window_is_taps_of_padded_channels() -> None:
    codes = codes_of(6, 40 * 9).reshape(6, 40, 3, 3)
    flat = window_codes(codes).reshape(6, 3, 3, 64)
    assert torch.equal(flat[..., :40], codes.permute(0, 2, 3, 1)) and not flat[..., 40:].any()
