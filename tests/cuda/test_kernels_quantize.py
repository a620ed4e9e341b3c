"""Quantize kernels in the PTX interpreter: numpy's codes, in rows and in images with a border."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from tests.cuda.kernels import F16, F32, STEPS, Array, Problem, one_a_byte, ptx_of, quantize
from tests.ptx import run
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, Tile, Window
from tfqc.runtime.kernel_ops import quantize_tokens

INVERSE = np.array([0.5, 40.0, 1e6], F32)  # all in the middle; the usual; beyond all codes


def values(*shape: int) -> Array:
    return np.random.default_rng(shape[-1]).normal(size=shape).astype(F16)


def codes(kernel: Quantize, arguments: list[Array], rows: int) -> Array:
    """Codes [rows, k padded to 32]; `arguments` are the kernel's, without out and rows."""
    pitch = -(-kernel.k // 32) * 32
    out = np.full((rows, pitch * kernel.bits // 8), 77, np.uint8)
    run(ptx_of(kernel), kernel.name, kernel.grid(rows), (kernel.threads, 1, 1), [*arguments, out, np.int32(rows)])
    return one_a_byte(out) if kernel.bits == 4 else out


@pytest.mark.parametrize(("bits", "k"), [(4, 72), (8, 70), (4, 33)])
def test_a_steps_scale_and_zero_point(bits: Literal[4, 8], k: int) -> None:
    top = 2**bits - 1
    x, zero = values(9, k), np.array([0, top // 2, top], np.int32)
    for step in range(STEPS):
        got = codes(Quantize("tfqc_values", k, bits), [x, INVERSE, zero, np.array([step], np.int32)], 9)
        assert np.array_equal(got[:, :k], quantize(x.astype(F32), INVERSE[step], zero[step], top))
        assert (got[:, k:] == zero[step]).all()


def test_halves_are_rounded_to_the_even_code_and_infinities_are_bounded() -> None:
    x = np.array([[0.5, 1.5, 2.5, -0.5, np.inf, -np.inf, 65504, np.nan]], F16)
    one, zero = np.array([1], F32), np.array([3], np.int32)
    got = codes(Quantize("tfqc_values", 8, 8, "one"), [x, one, zero, np.zeros(1, np.int32)], 1)
    assert got[0, :8].tolist() == [3, 5, 5, 3, 255, 0, 255, 0]


@pytest.mark.parametrize("k", [296, 37])
def test_each_token_finds_its_scale(k: int) -> None:
    x = values(11, k)
    x[1], x[2], x[3] = 0, np.abs(x[2]), -np.abs(x[3])
    scale, zero = np.empty(11, F32), np.empty(11, np.int32)
    got = codes(Quantize("tfqc_tokens", k, 8, "token"), [x, scale, zero], 11)
    for mine, theirs in zip((got[:, :k], scale, zero), quantize_tokens(torch.from_numpy(x)), strict=True):
        assert np.array_equal(mine, theirs.numpy())
    assert (got[:, k:] == zero[:, None]).all()


def test_an_image_gets_a_border_of_zero_points_and_goes_into_a_convolution() -> None:
    batch, height, width, channels = 2, 3, 4, 40
    x, zero, step = values(batch, height, width, channels), np.array([0, 7, 15], np.int32), np.array([1], np.int32)
    rows = batch * (height + 2) * (width + 2)
    got = codes(Quantize("tfqc_image", channels, 4, "step", (height, width)), [x, INVERSE, zero, step], rows)
    image = got.reshape(batch, height + 2, width + 2, 64)
    inside = image[:, 1:-1, 1:-1, :channels]
    assert np.array_equal(inside, quantize(x.astype(F32), INVERSE[1], zero[1], 15))
    border = image.copy()
    border[:, 1:-1, 1:-1] = 7
    assert (border == 7).all()

    kernel = Gemm("tfqc_conv", 36, 9 * 64, "w4a4", "s4", Epilogue("step", bias="one"), Window(3, 4), Tile(m=64, n=64))
    problem = Problem(kernel, batch * height * width, image)
    assert np.array_equal(problem.run(1)[0], problem.want(1).astype(F16))
