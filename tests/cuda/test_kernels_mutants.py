"""Kernels with one fault each: the interpreter or the numbers must give every one of them away.

That no fault goes unseen is what makes the other tests of kernels worth something.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.cuda.kernels import F16, Problem
from tests.ptx import PtxError
from tfqc.backends.cuda_int4.specialise import Body, Epilogue, Gemm, Tile

FAULTS: dict[str, tuple[Body, str, str, str]] = {
    # what is wrong: body, text, what it becomes, and what gives it away (in the interpreter's words, or the numbers)
    "waits for one tile too few": ("s4", "copies_wait<S::STAGES - 2>", "copies_wait<S::STAGES - 1>", "cp.async"),
    "waits for nothing before the tail": ("s4", "copies_wait<0>", "copies_wait<4>", "cp.async"),
    "no barrier in the loop": ("s4", "2>();\n    __syncthreads();", "2>();", "race|barrier"),
    "fills the tile that is read": ("s4", "empty = full;", "", "race|barrier|cp.async"),
    "a swizzled only when written": ("s4", "(lane / 16 ^ G::swizzle(row))", "(lane / 16)", "numbers"),
    "not swizzled": ("s4", "return row / (8 / CHUNKS) % CHUNKS;", "return 0;", "conflicts"),
    "rows beyond M are read": ("s4", "CHUNKS), m - 1)", "CHUNKS), m + 9)", "argument 0"),
    "rows beyond M are written": ("s4", "if (row >= m) return;", "", "argument (8|11)"),
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
    "scale with the factor": ("nibble", "* (1.0f / L::FACTOR)", "", "numbers"),
    "scales multiplied in another order": (
        "s4",
        "__fmul_rn((float)centred[j], __fmul_rn(scale, scales[j]))",
        "__fmul_rn(__fmul_rn((float)centred[j], scale), scales[j])",
        "numbers",
    ),
    "bias fused into the product": (
        "s4",
        "y[j] = __fadd_rn(y[j], bias[j])",
        "y[j] = fmaf((float)centred[j], __fmul_rn(scale, scales[j]), bias[j])",
        "numbers",
    ),
    "always the first step": ("s4", "STEPPED ? __ldg(p.step) : 0", "0", "numbers"),
    "the bias of another column": ("s4", "__fadd_rn(y[j], bias[j])", "__fadd_rn(y[j], bias[j ^ 1])", "numbers"),
    "the residual of another row": ("s4", "residual[i % AHEAD]", "residual[(i + 1) % AHEAD]", "numbers"),
    "halves exchanged": ("s4", '"f"(high), "f"(low)', '"f"(low), "f"(high)', "numbers"),
}  # fmt: skip


def problem(body: Body) -> Problem:
    """Tails of M and K, and a ring that goes round."""
    end = Epilogue("step", bias="step", residual=True)
    return Problem(Gemm("tfqc_product", 40, 416, "w4a4", body, end, tile=Tile(m=64, n=64)), 66)


@pytest.mark.parametrize("body", ["s4", "nibble"])
def test_without_a_fault_nothing_is_given_away(body: Body) -> None:
    sound = problem(body)
    got, cost = sound.run(2)
    assert np.array_equal(got, sound.want(2).astype(F16)) and cost.conflicts() == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_given_away(fault: str) -> None:
    body, old, new, by = FAULTS[fault]
    mutant = problem(body)
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
