"""Products in the PTX interpreter: exact sums, and epilogues equal to numpy in the stated order of rounding."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cuda.kernels import F16, Array, Problem
from tfqc.backends.cuda_int4.runtime.specialise import Body, Epilogue, Gemm, Mode, Tile, Window

KINDS: dict[str, tuple[Mode, Body]] = {
    "s4": ("w4a4", "s4"),
    "nibble": ("w4a4", "nibble"),
    "w4a8": ("w4a8", "nibble"),
    "half": ("w4a16", "half"),
}
CODES = tuple(kind for kind in KINDS if kind != "half")
SMALL = Tile(m=64, n=64)
SQUARE = Tile(warp_n=64)
WIDE = Tile(n=160, row_bytes=128, stages=2, warp_m=32, warp_n=160)
TALL = Tile(m=224, row_bytes=128, stages=2, warp_m=112)
kinds = pytest.mark.parametrize("kind", KINDS)
of_codes = pytest.mark.parametrize("kind", CODES)


def product(kind: str, n: int, k: int, end: Epilogue, tile: Tile = SMALL, window: Window | None = None) -> Gemm:
    return Gemm(f"tfqc_{kind}", n, k, *KINDS[kind], end, window, tile)


def close(got: Array, want: Array, slack: Array) -> bool:
    """Within a unit in the last place of f16, and what fast math leaves of f32's precision."""
    return bool((np.abs(got.astype(np.float64) - want) <= np.spacing(np.abs(want).astype(F16)) + slack).all())


@of_codes
@pytest.mark.parametrize(
    ("n", "k", "m", "tile"),
    [
        (70, 160, 131, Tile()),  # tails of M, N and K, the last of half a unit
        (64, 32, 3, SMALL),  # less than a tile
        (64, 640, 64, SMALL),  # the ring goes round, no tails
        (33, 672, 65, Tile(m=128, n=64, row_bytes=128, stages=2)),  # all banks for a row
        (70, 160, 131, SQUARE),
        (170, 672, 33, WIDE),  # all of a column of tiles' columns in a warp
        (40, 288, 226, TALL),
    ],
)
def test_sums_are_exact(kind: str, n: int, k: int, m: int, tile: Tile) -> None:
    problem = Problem(product(kind, n, k, Epilogue("step", out="s32"), tile), m)
    for step in (0, 1):  # the least and the greatest zero point
        got, cost = problem.run(step)
        assert np.array_equal(got, problem.sums(step))
        assert cost.conflicts() == 0


@pytest.mark.parametrize(("kind", "k"), [("nibble", 69888), ("w4a8", 65760)])
def test_the_longest_sums_of_the_greatest_codes_fit(kind: str, k: int) -> None:
    problem = Problem(product(kind, 1, k, Epilogue("step", out="s32")), 1)
    greatest = 15 if kind == "nibble" else 255
    assert problem.run(0)[0].item() == greatest * -8 * k


@kinds
@pytest.mark.parametrize("n", [72, 70, 37])
def test_f16_is_numpys_in_the_stated_order(kind: str, n: int) -> None:
    problem = Problem(product(kind, n, 96, Epilogue("step", bias="step", residual=True)), 70)
    for step in (0, 2):
        got, _ = problem.run(step)
        assert np.array_equal(got, problem.want(step).astype(F16))


@of_codes
def test_each_token_has_its_scale(kind: str) -> None:
    problem = Problem(product(kind, 40, 64, Epilogue("token", bias="one")), 70)
    assert np.array_equal(problem.run(0)[0], problem.want(0).astype(F16))


@pytest.mark.parametrize("end", [
    Epilogue("step", bias="step", activation="silu", residual=True),
    Epilogue("one", activation="gelu"),
    Epilogue("one", bias="step", activation="gelu_tanh"),
    Epilogue("token", bias="one", activation="geglu", residual=True),
])  # fmt: skip
@pytest.mark.parametrize("n", [80, 36])
def test_activations_are_close(end: Epilogue, n: int) -> None:
    problem = Problem(product("s4", n, 64, end), 40)
    for step in (0, 2):
        y = np.abs(problem.before_activation(step)).astype(np.float64)
        slack = y if end.activation != "geglu" else y[:, : n // 2] * y[:, n // 2 :]
        assert close(problem.run(step)[0], problem.want(step), slack * 2.0**-20)


@pytest.mark.parametrize(("kind", "end"), [
    ("s4", Epilogue("step", bias="step", out="u4")),
    ("nibble", Epilogue("one", residual=True, out="u8", out_scales="one")),
    ("w4a8", Epilogue("token", bias="one", out="u8")),
])  # fmt: skip
@pytest.mark.parametrize("n", [72, 37])
def test_codes_for_the_next_layer_are_numpys(kind: str, end: Epilogue, n: int) -> None:
    problem = Problem(product(kind, n, 64, end), 40)
    for step in (0, 2):
        assert np.array_equal(problem.run(step)[0], problem.codes(problem.want(step), step))


@pytest.mark.parametrize("kind", ["s4", "nibble", "w4a8"])
@pytest.mark.parametrize(("tile", "m"), [(WIDE, 40), (TALL, 230)])
def test_a_warp_finishes_its_strips_of_columns_one_after_the_other(kind: str, tile: Tile, m: int) -> None:
    plain = Problem(product(kind, 330, 96, Epilogue("token", bias="step", residual=True), tile), m)
    assert np.array_equal(plain.run(2)[0], plain.want(2).astype(F16))
    gated = Problem(product(kind, 300, 96, Epilogue("step", bias="step", activation="geglu", out="u8"), tile), m)
    got, want = gated.run(1)[0].astype(int), gated.codes(gated.want(1), 1)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 0.002


@pytest.mark.parametrize(("activation", "out"), [("geglu", "u4"), ("gelu", "u8"), ("gelu_tanh", "u8"), ("silu", "u4")])
def test_codes_of_activations_differ_by_ties_alone(activation: str, out: str) -> None:
    end = Epilogue("step", bias="step", activation=activation, out=out)  # type: ignore[arg-type]
    problem = Problem(product("s4", 72, 64, end), 40)
    got, want = problem.run(1)[0].astype(int), problem.codes(problem.want(1), 1)
    assert np.abs(got - want).max() <= 1
    assert (got != want).mean() < 0.002


@of_codes
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_reads_windows_where_they_lie(kind: str, stride: int) -> None:
    height, width, channels, batch = 5, 7, 32, 2
    kernel = product(kind, 40, 9 * channels, Epilogue("step", out="s32"), SMALL, Window(height, width, stride))
    make = np.random.default_rng(3)
    image = make.integers(0, 2**kernel.a_bits, (batch, height + 2, width + 2, channels), np.uint8)
    problem = Problem(kernel, batch * -(-height // stride) * -(-width // stride), image)
    assert np.array_equal(problem.run(1)[0], problem.sums(1))


@pytest.mark.parametrize(("kind", "n", "k", "m", "window", "tile"), [
    ("s4", 10240, 1280, 300, None, Tile()),  # feed-forward
    ("s4", 1280, 1280, 2048, None, TALL),
    ("s4", 320, 9 * 320, 128 * 128, Window(128, 128), Tile(n=160, stages=2, warp_m=32, warp_n=160)),
    ("w4a8", 320, 9 * 320, 128 * 128, Window(128, 128), Tile()),
    ("nibble", 640, 9 * 1920, 64 * 64, Window(64, 64), Tile()),
])  # fmt: skip
def test_the_last_block_of_layers_of_sdxl(kind: str, n: int, k: int, m: int, window: Window | None, tile: Tile) -> None:
    kernel = product(kind, n, k, Epilogue("step", out="s32"), tile, window)
    image = None
    if window is not None:
        size = (1, window.height + 2, window.width + 2, k // 9)
        image = np.random.default_rng(4).integers(0, 2**kernel.a_bits, size, np.uint8)
    problem = Problem(kernel, m, image)
    y, x, _ = kernel.grid(m)
    got, cost = problem.run(1, block=(y - 1, x - 1))
    rows, columns = slice((y - 1) * tile.m, None), slice((x - 1) * tile.n, None)
    assert np.array_equal(got[rows, columns], problem.sums(1, rows, columns))
    assert (got[: rows.start] == 77).all() and (got[:, : columns.start] == 77).all()
    assert cost.conflicts() == 0
