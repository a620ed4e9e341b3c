"""The branch of low rank in the PTX interpreter: down beside the codes, up in the epilogue."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.cuda.kernels import F16, F32, Array, Problem, eighths, one_a_byte, ptx_of, quantize
from tests.ptx import run
from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, Tile

SMALL = Tile(m=64, n=64)
END = Epilogue("step", bias="step", residual=True, rank=32)
PLAIN = Gemm("tfqc_product", 70, 64, "w4a4", "s4", END, tile=SMALL)


@pytest.mark.parametrize("kernel", [
    PLAIN,
    replace(PLAIN, body="nibble", epilogue=replace(END, scales="token", rank=16)),
    replace(PLAIN, mode="w4a8", body="nibble", epilogue=replace(END, rank=128)),
    replace(PLAIN, n=40, k=160, group=128),
    replace(PLAIN, n=130, mode="w4a16", body="half", epilogue=replace(END, bias="none")),
])  # fmt: skip
def test_f16_is_numpys_in_the_stated_order(kernel: Gemm) -> None:
    problem = Problem(kernel, 81)
    assert np.array_equal(problem.run(1)[0], problem.want(1).astype(F16))


def test_values_have_their_gates_ranks() -> None:
    end = replace(END, activation="geglu", out="u8")
    problem = Problem(replace(PLAIN, n=80, epilogue=end), 40)
    got, want = problem.run(1)[0].astype(int), problem.codes(problem.want(1), 1)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.002


@pytest.mark.parametrize(("bits", "k", "rows", "rank"), [(4, 320, 32, 32), (8, 296, 21, 16), (4, 37, 5, 128)])
def test_one_read_gives_codes_and_what_goes_into_the_low_rank(bits: int, k: int, rows: int, rank: int) -> None:
    kernel = Quantize("tfqc_down", k, bits, rank=rank)  # type: ignore[arg-type]
    assert kernel.arguments == ("x", "inverse", "zero", "step", "out", "down", "low", "rows")
    make, top = np.random.default_rng(k), 2**bits - 1
    x, down = eighths(make, rows, k), eighths(make, k, rank)
    inverse, zero, step = np.array([9, 2.3], F32), np.array([0, 5], np.int32), np.array([1], np.int32)
    pitch = -(-k // 32) * 32
    out, low = np.full((rows, pitch * bits // 8), 77, np.uint8), np.full((rows, rank), 77, F16)
    packed: Array = pack.pack_down(torch.from_numpy(down)).numpy()
    arguments = [x, inverse, zero, step, out, packed, low, np.int32(rows)]
    run(ptx_of(kernel), kernel.name, kernel.grid(rows), (kernel.threads, 1, 1), arguments)
    codes = one_a_byte(out) if bits == 4 else out
    assert np.array_equal(codes[:, :k], quantize(x.astype(F32), inverse[1], zero[1], top))
    assert (codes[:, k:] == 5).all()
    assert np.array_equal(low, (x.astype(np.float64) @ down.astype(np.float64)).astype(F16))
