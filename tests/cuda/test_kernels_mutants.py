"""Kernels with one fault each: the interpreter or the numbers must give every one of them away.

That no fault goes unseen is what makes the other tests of kernels worth something.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from tests.cuda.kernels import F16, Problem
from tests.ptx import PtxError
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Tile

SMALL = Tile(m=64, n=64)
END = Epilogue("step", bias="step", residual=True)
# Tails of M and K, and a ring that goes round.
KERNELS = {
    "s4": Gemm("tfqc_product", 40, 416, "w4a4", "s4", END, tile=SMALL),
    "nibble": Gemm("tfqc_product", 40, 416, "w4a4", "nibble", END, tile=SMALL),
    "half": Gemm("tfqc_product", 40, 416, "w4a16", "half", END),
    "s4 groups": Gemm("tfqc_product", 40, 416, "w4a4", "s4", END, tile=SMALL, group=128),
    "w4a8 groups": Gemm("tfqc_product", 40, 416, "w4a8", "nibble", END, tile=SMALL, group=128),
    "half groups": Gemm("tfqc_product", 40, 416, "w4a16", "half", END, tile=SMALL, group=128),
    "low rank": Gemm("tfqc_product", 40, 64, "w4a4", "s4", replace(END, scales="token", rank=32), tile=SMALL),
}

FAULTS = {
    # what is wrong: kernel, text, what it becomes, and what gives it away (in the interpreter's words, or the numbers)
    "waits for one tile too few": ("s4", "copies_wait<S::STAGES - 2>", "copies_wait<S::STAGES - 1>", "cp.async"),
    "waits for nothing before the tail": ("s4", "copies_wait<0>", "copies_wait<4>", "cp.async"),
    "no barrier in the loop": ("s4", "2>();\n    __syncthreads();", "2>();", "race|barrier"),
    "fills the tile that is read": ("s4", "empty = full;", "", "race|barrier|cp.async"),
    "a swizzled only when written": ("s4", "(lane / 16 ^ G::swizzle(row))", "(lane / 16)", "numbers"),
    "not swizzled": ("s4", "return row / (8 / CHUNKS) % CHUNKS;", "return 0;", "conflicts"),
    "rows beyond M are read": ("s4", "CHUNKS), m - 1)", "CHUNKS), m + 9)", "argument 0"),
    "rows beyond M are written": ("s4", "if (row >= m) return;", "", "argument (8|13)"),
    "inputs beyond K are read": ("s4", "q < S::K / G::CHUNK_CODES", "true", "argument 0"),
    "weights beyond K are read": ("s4", "tile * G::STEPS + unit < G::UNITS", "true", "argument 1"),
    "codes of a are signed": ("s4", "s32.u4.s4.s32", "s32.s4.s4.s32", "numbers"),
    "weights are unsigned": ("nibble", "s32.u8.s8.s32", "s32.u8.u8.s32", "numbers"),
    "registers of weights exchanged": (
        "s4",
        "w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]",
        "w[j / 2][j % 2 * 2 + 1], w[j / 2][j % 2 * 2]",
        "numbers",
    ),
    "high codes with low ones": ("nibble", "high, machine::high_codes", "low, machine::high_codes", "numbers"),
    "low codes keep their high neighbours": ("nibble", "(x << 4) & 0xF0F0F0F0u", "x << 4", "numbers"),
    "zero points without the factor": ("nibble", "* L::FACTOR;", ";", "numbers"),
    "scale with the factor": ("nibble", "* (1.0f / L::FACTOR)", "* 1.0f", "numbers"),
    "scales multiplied in another order": (
        "s4",
        "__fmul_rn((float)sum, __fmul_rn(by, scales[j]))",
        "__fmul_rn(__fmul_rn((float)sum, by), scales[j])",
        "numbers",
    ),
    "always the first step": ("s4", "STEPPED ? __ldg(p.step) : 0", "0", "numbers"),
    "the bias of another column": ("s4", "__fadd_rn(y[j], bias[j])", "__fadd_rn(y[j], bias[j ^ 1])", "numbers"),
    "the residual of another row": ("s4", "residual[i % AHEAD]", "residual[(i + 1) % AHEAD]", "numbers"),
    "halves exchanged": ("s4", '"f"(high), "f"(low)', '"f"(low), "f"(high)', "numbers"),
    "codes of f16 keep their sign bit": ("half", "0x6A;", "0xEA;", "numbers"),
    "registers of f16 weights exchanged": ("half", "b[j][0], b[j][1]);", "b[j][1], b[j][0]);", "numbers"),
    "one instruction's codes for both": ("half", "w[j] >> 8 * read", "w[j]", "numbers"),
    "all threads copy weights": ("half", "threadIdx.x * 16 < G::W_BYTES", "true", "argument 1"),
    "scales of the tile, not of its group": ("half groups", "tile * S::TILE_K / S::GROUP", "tile", "argument 3"),
    "the scale of another column": ("half groups", "g % 2 ? 0x3232 : 0x1010", "0x1010", "numbers"),
    "the last group is left out": ("w4a8 groups", " || tile == Geometry<S>::TILES - 1", "", "numbers"),
    "groups' zero points without the factor": ("w4a8 groups", "* -epilogue::Layout<S>::FACTOR", "* -1", "numbers"),
    "sums of groups fused": (
        "s4 groups",
        "__fadd_rn(y, __fmul_rn(sum, __uint_as_float(scales[j])))",
        "fmaf(sum, __uint_as_float(scales[j]), y)",
        "numbers",
    ),
    "rows of low beyond M are read": ("low rank", "row + i * 16 + 8 < m", "true", "argument 9"),
    "the low rank of other columns": ("low rank", "n0 / gemm::STRIP_N", "0", "numbers"),
    "low ranks in another order than up": ("low rank", "a[0], a[2], rows", "a[2], a[0], rows", "numbers"),
    "the last ranks are left out": ("low rank", "step < STEPS", "step < STEPS - 1", "numbers"),
    "tokens get the scale of another row": ("low rank", "i / COUNT, 4)", "i / COUNT / 2, 4)", "numbers"),
    "scales of groups for their sums": ("s4 groups", "terms_at + S::TILE_N * 4", "terms_at", "numbers"),
}  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_fault_nothing_is_given_away(kernel: str) -> None:
    sound = Problem(KERNELS[kernel], 66)
    got, cost = sound.run(2)
    assert np.array_equal(got, sound.want(2).astype(F16)) and cost.conflicts() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_given_away(fault: str) -> None:
    kernel, old, new, by = FAULTS[fault]
    mutant = Problem(KERNELS[kernel], 66)
    try:
        got, cost = mutant.run(2, (old, new))
    except PtxError as error:
        assert re.search(by, str(error)), error
        return
    if by == "conflicts":
        assert cost.conflicts() > 0
    else:
        assert by == "numbers"
        assert not np.array_equal(got, mutant.want(2).astype(F16))
