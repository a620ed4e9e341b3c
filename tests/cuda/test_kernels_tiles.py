"""The rule that chooses tiles: a pure function whose tiles suit, and the choices that it was made for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfqc.backends.cuda_int4.runtime.specialise import ARCHS, Epilogue, Gemm, Mode, body_for
from tfqc.backends.cuda_int4.tile_choice import DEEP, NARROW, SQUARE, TALL, TILES, WIDE, tile_for

modes = st.sampled_from(("w4a4", "w4a8"))


@given(st.integers(1, 700), st.integers(1, 800), st.integers(1, 70000), modes, st.sampled_from(ARCHS), st.booleans())
def test_every_product_has_a_tile_that_suits_it(n: int, k: int, m: int, mode: Mode, arch: str, paired: bool) -> None:
    end = Epilogue(activation="geglu" if paired else "none")
    tile = tile_for(2 * n, 32 * k, m, mode, arch, paired)
    assert tile in TILES
    Gemm("tfqc_q", 2 * n, 32, mode, body_for(arch, mode), end, None, tile)


@pytest.mark.parametrize(
    ("arch", "mode", "m", "n", "k", "tile"),
    [
        ("sm_80", "w4a4", 2048, 1280, 5120, TALL),  # 100 blocks for 108 multiprocessors, not 160
        ("sm_80", "w4a4", 32768, 320, 5760, WIDE),  # 320 columns are not 384
        ("sm_80", "w4a8", 8192, 640, 5760, SQUARE),  # three blocks for each
        ("sm_89", "w4a4", 2048, 1280, 5120, DEEP),  # 128 blocks for 128 multiprocessors
        ("sm_89", "w4a4", 8192, 640, 5760, WIDE),  # 256
        ("sm_86", "w4a8", 2048, 1280, 5120, SQUARE),  # 160 blocks, two for each of 82
        ("sm_89", "w4a4", 2048, 64, 2560, NARROW),
        ("sm_86", "w4a8", 65536, 64, 2880, NARROW),
    ],
)
def test_tiles_leave_few_multiprocessors_idle(arch: str, mode: Mode, m: int, n: int, k: int, tile: object) -> None:
    assert tile_for(n, k, m, mode, arch) == tile
