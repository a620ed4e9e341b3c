"""Scales for groups of 128 inputs in the PTX interpreter: s32 sums of each, added in f32 in the stated order."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.kernels import F16, Problem
from tfqc.backends.cuda_int4.runtime.specialise import Body, Epilogue, Gemm, Mode, Tile

KINDS: dict[str, tuple[Mode, Body]] = {
    "s4": ("w4a4", "s4"),
    "nibble": ("w4a4", "nibble"),
    "w4a8": ("w4a8", "nibble"),
}
SMALL = Tile(m=64, n=64)
kinds = pytest.mark.parametrize("kind", KINDS)


def product(kind: str, n: int, k: int, end: Epilogue, tile: Tile = SMALL) -> Gemm:
    mode, body = KINDS[kind]
    return Gemm(f"tfqc_{kind}", n, k, mode, body, end, tile=tile, group=128)


@kinds
@pytest.mark.parametrize(
    ("n", "k", "m", "tile"),
    [
        (70, 288, 131, Tile()),  # tails of M, N and K; the last group has 32 inputs
        (64, 64, 3, SMALL),  # less than a group
        (64, 640, 64, SMALL),  # the ring goes round, no tails
    ],
)
def test_f16_is_numpys_in_the_stated_order(kind: str, n: int, k: int, m: int, tile: Tile) -> None:
    """With the greatest codes and zero points, whose sums have to be within the trick that converts them."""
    problem = Problem(product(kind, n, k, Epilogue("step", bias="step", residual=True), tile), m)
    for step in (0, 1):  # the least and the greatest zero point
        got, cost = problem.run(step)
        assert np.array_equal(got, problem.want(step).astype(F16))
        assert cost.conflicts() == 0


@pytest.mark.parametrize("k", [256, 224, 192])
def test_a_group_may_be_one_tile_of_two(k: int) -> None:
    tile = Tile(m=64, n=64, row_bytes=128, stages=2)
    for its in (tile, SMALL):
        problem = Problem(product("w4a8", 64, k, Epilogue("step"), its), 64)
        assert np.array_equal(problem.run(2)[0], problem.want(2).astype(F16))


@kinds
def test_each_token_has_its_zero_point(kind: str) -> None:
    problem = Problem(product(kind, 40, 160, Epilogue("token", bias="one")), 70)
    assert np.array_equal(problem.run(0)[0], problem.want(0).astype(F16))


def test_values_have_their_gates_scales() -> None:
    problem = Problem(product("s4", 80, 160, Epilogue(activation="geglu", out="u4")), 40)
    got, want = problem.run(1)[0].astype(int), problem.codes(problem.want(1), 1)
    assert np.abs(got - want).max() <= 1 and (got != want).mean() < 0.002


@kinds
def test_the_greatest_sums_of_a_group_fit(kind: str) -> None:
    """Greatest codes by least weights, and the other way round by the zero point."""
    problem = Problem(product(kind, 64, 128, Epilogue("step")), 2)
    problem.rows[1] = 0
    problem.weight[1] = 7
    problem.scale[:], problem.weight_scale[:] = 2.0**-4, 2.0**-4
    for step in (0, 1):
        assert np.array_equal(problem.run(step)[0], problem.want(step).astype(F16))
