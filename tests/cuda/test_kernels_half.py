"""Products of f16 rows in the PTX interpreter: exact where sums are, near where a chip may round in its own order."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from tests.cuda.kernels import F16, F32, Array, Problem, eighths, ptx_of
from tests.ptx import run
from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, Tile, Window

SMALL = Tile(m=64, n=64)
groups = pytest.mark.parametrize("group", [None, 128])
Group = Literal[128] | None


def product(n: int, k: int, end: Epilogue, tile: Tile = SMALL, group: Group = None) -> Gemm:
    return Gemm("tfqc_half", n, k, "w4a16", "half", end, tile=tile, group=group)


@groups
@pytest.mark.parametrize(
    ("n", "k", "m", "tile"),
    [
        (70, 160, 131, Tile()),  # tails of M and N; half of the threads copy no weights
        (64, 32, 3, SMALL),  # less than a tile
        (64, 320, 64, SMALL),  # the ring goes round, no tails but of groups
        (33, 224, 65, Tile(m=128, n=64, row_bytes=128, stages=2)),  # a tail of K, all banks for a row
    ],
)
def test_sums_that_f32_holds_are_exact(n: int, k: int, m: int, tile: Tile, group: Group) -> None:
    problem = Problem(product(n, k, Epilogue(bias="step", residual=True), tile, group), m)
    got, cost = problem.run(2)
    assert np.array_equal(got, problem.want(2).astype(F16))
    assert cost.conflicts() == 0


@groups
def test_values_have_their_gates_scales(group: Group) -> None:
    problem = Problem(product(80, 160, Epilogue(activation="geglu", out="u8"), group=group), 40)
    got, want = problem.run(1)[0].astype(int), problem.codes(problem.want(1), 1)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.002


@groups
def test_other_values_are_near(group: Group) -> None:
    """Each sum is rounded some K times to f32, in an order that is the chip's."""
    problem = Problem(product(64, 160, Epilogue(), group=group), 64)
    make = np.random.default_rng(5)
    problem.rows = make.normal(size=problem.rows.shape).astype(F16)
    problem.weight_scale = make.uniform(0.01, 0.02, problem.weight_scale.shape).astype(problem.weight_scale.dtype)
    weights = problem.dequantized() if group else problem.weight * problem.weight_scale[:, None]
    most = np.abs(problem.rows).astype(np.float64) @ np.abs(weights).T.astype(np.float64)
    got, want = problem.run(0)[0].astype(np.float64), problem.product(0)
    assert (np.abs(got - want) <= np.spacing(np.abs(want).astype(F16)) + most * 160 * 2.0**-24).all()


def test_an_image_gets_a_border_of_zeros_and_goes_into_a_convolution() -> None:
    batch, height, width, channels = 2, 3, 4, 20
    x = eighths(np.random.default_rng(6), batch, height, width, channels)
    image = np.full((batch, height + 2, width + 2, 32), 77, F16)
    rows = np.int32(image.size // 32)
    copy = Quantize("tfqc_copy", channels, 16, image=(height, width))
    assert copy.arguments == ("x", "out", "rows")
    run(ptx_of(copy), copy.name, copy.grid(int(rows)), (copy.threads, 1, 1), [x, image, rows])
    assert np.array_equal(image[:, 1:-1, 1:-1, :channels], x)
    assert np.count_nonzero(image) == np.count_nonzero(x)

    for stride in (1, 2):
        window = Window(height, width, stride)
        kernel = Gemm("tfqc_conv", 36, 9 * 32, "w4a16", "half", Epilogue(bias="one"), window, SMALL)
        problem = Problem(kernel, batch * -(-height // stride) * (width // stride), image)
        assert np.array_equal(problem.run(1)[0], problem.want(1).astype(F16))


def test_a_copy_keeps_every_value() -> None:
    x = np.arange(2**16, dtype=np.uint16).reshape(-1, 64)[:, :37].copy().view(F16)
    out = np.full((len(x), 64), 77, F16)
    copy = Quantize("tfqc_copy", 37, 16)
    run(ptx_of(copy), copy.name, copy.grid(len(x)), (copy.threads, 1, 1), [x, out, np.int32(len(x))])
    assert np.array_equal(out[:, :37].view(np.uint16), x.view(np.uint16)) and not out[:, 37:].any()


def test_every_code_becomes_its_f16() -> None:
    """A row of ones on one input at a time sees one code of each column."""
    kernel = product(64, 32, Epilogue())
    problem = Problem(kernel, 32)
    problem.rows = np.eye(32, dtype=F16)
    problem.weight = (np.arange(64 * 32).reshape(64, 32) % 16 - 8).astype(np.int8)
    problem.weight_scale = np.ones(64, F32)
    codes: Array = problem.run(0)[0]
    assert np.array_equal(codes, problem.weight.T)
