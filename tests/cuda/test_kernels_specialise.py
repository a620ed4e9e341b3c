"""The text of kernels: constants of the program, the same bytes twice, and refusals before any compiler."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.cuda.kernels import ptx_of
from tfqc.backends.cuda_int4.runtime.specialise import (
    ARCHS,
    Epilogue,
    Gemm,
    Quantize,
    Tile,
    Window,
    body_for,
    for_arch,
    source,
)
from tfqc.errors import TfqcError

PLAIN = Gemm("tfqc_q", 320, 640, "w4a4", "s4")

ENTRY = """\
struct tfqc_up_constants {
  static constexpr int N = 320, K = 5760, A_BITS = 8;
  static constexpr int TILE_M = 128, TILE_N = 64, TILE_K = 64;
  static constexpr int WARP_M = 64, WARP_N = 32;
  static constexpr int STAGES = 3, GROUP = 0;
  static constexpr Body BODY = Body::NIBBLE;
  static constexpr Rows SCALES = Rows::STEP, OUT_SCALES = Rows::STEP;
  static constexpr Bias BIAS = Bias::STEP;
  static constexpr Activation ACTIVATION = Activation::SILU;
  static constexpr bool RESIDUAL = true;
  static constexpr Out OUT = Out::F16;
  static constexpr int RANK = 0;
  using Operand = ConvRows<640, 32, 24, 2>;
};

extern "C" __global__ void __launch_bounds__(128, 4) tfqc_up(
    const u8* a, const u8* weight, const int* weight_sum, const float* weight_scale, const float* bias,
    const float* scale, const int* zero, const int* step, const u16* residual, const u16* low,
    const u16* up, const float* out_inverse, const int* out_zero, void* out, int m) {
  const epilogue::Parameters parameters{weight_sum, weight_scale, bias, scale, zero, step,
                                        residual, low, up, out_inverse, out_zero, out};
  gemm::run<tfqc_up_constants>(a, weight, parameters, m);
}
"""


def test_an_entry_is_constants_and_a_call() -> None:
    end = Epilogue("step", bias="step", activation="silu", residual=True)
    kernel = Gemm("tfqc_up", 320, 9 * 640, "w4a8", "nibble", end, Window(32, 24, 2), Tile(n=64))
    assert source([kernel]).endswith(ENTRY)


def test_the_text_is_the_same_twice_and_includes_nothing() -> None:
    kernels = [PLAIN, replace(PLAIN, name="tfqc_k"), Quantize("tfqc_in", 640, 4)]
    text = source(kernels)
    assert text == source(kernels)
    assert "#include" not in text and "#pragma once" not in text
    assert text.count("namespace machine {") == 1
    assert "namespace quantize" not in source([PLAIN])


def test_which_chip_multiplies_four_bits() -> None:
    assert [body_for(arch, "w4a4") for arch in ARCHS] == ["s4", "s4", "s4", "nibble", "nibble"]
    assert {body_for(arch, "w4a8") for arch in ARCHS} == {"nibble"}
    there = for_arch(PLAIN, "sm_90a")
    assert isinstance(there, Gemm) and there.body == "nibble"


def test_one_text_serves_chips_with_and_without_products_of_four_bits() -> None:
    auto = replace(PLAIN, body="auto")
    for arch, body in (("sm_89", "s4"), ("sm_90a", "nibble")):
        assert ptx_of(auto, arch) == ptx_of(replace(PLAIN, body=body), arch)
        assert for_arch(auto, arch) == replace(PLAIN, body=body)
    with pytest.raises(TfqcError, match="depends on the chip"):
        _ = auto.multiplies


def test_launches_cover_the_output() -> None:
    assert PLAIN.grid(129) == (2, 3, 1) and PLAIN.threads == 256 and PLAIN.padded_n == 384
    assert PLAIN.shared_bytes == 3 * (128 * 64 + 128 * 64)
    assert Quantize("tfqc_q", 70, 8).grid(100) == (5, 1, 1)  # 12 threads a row of 96 codes
    assert Quantize("tfqc_q", 70, 8, "token").grid(100) == (13, 1, 1)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"name": "tfqc_down.q"}, "has to be tfqc_ and letters"),
        ({"k": 40}, "k = 40 has to be a multiple of 32"),
        ({"mode": "w4a8"}, "multiplied by the nibble body"),
        ({"mode": "w4a8", "body": "auto"}, "multiplied by the nibble body"),
        ({"body": "nibble", "k": 69920}, "s32 holds the sums of 69904 codes"),
        ({"body": "auto", "k": 69920}, "s32 holds the sums of 69904 codes"),
        ({"tile": Tile(m=96)}, "has to be whole warps"),
        ({"tile": Tile(n=160, warp_n=80)}, "strips of 32 columns"),
        ({"tile": Tile(row_bytes=32)}, "rows of 64 or 128 bytes"),
        ({"tile": Tile(warp_n=64), "group": 128}, "more sums than fit"),
        ({"tile": Tile(m=64, n=32, row_bytes=128)}, "too few threads"),
        ({"tile": Tile(m=192)}, "no whole number of copies"),
        ({"mode": "w4a16"}, "f16 is multiplied by the half body"),
        ({"body": "half"}, "f16 is multiplied by the half body"),
        ({"k": 9 * 32, "window": Window(8, 8), "group": 128}, "3 x 3 has no groups"),
        ({"group": 128, "tile": Tile(row_bytes=128)}, "within a group of 128 inputs"),
        ({"group": 128, "tile": Tile(n=32)}, "columns in whole 64"),
        ({"group": 128, "epilogue": Epilogue(out="s32")}, "those of f16 or of groups are f32"),
        ({"mode": "w4a16", "body": "half", "epilogue": Epilogue(out="s32")}, "those of f16 or of groups are f32"),
        ({"epilogue": Epilogue(rank=24)}, "multiple of 16, at most 128"),
        ({"epilogue": Epilogue(rank=16, out="s32")}, "nothing done to them"),
        ({"window": Window(8, 8)}, "9 times the channels"),
        ({"n": 5, "epilogue": Epilogue(activation="geglu")}, "even number of columns"),
        ({"n": 96, "tile": Tile(n=32), "epilogue": Epilogue(activation="geglu")}, "rows of 32 outputs"),
        ({"epilogue": Epilogue(out="s32", bias="one")}, "nothing done to them"),
    ],
)
def test_what_no_kernel_can_do_is_refused_in_one_sentence(changes: dict[str, object], because: str) -> None:
    with pytest.raises(TfqcError, match=because):
        replace(PLAIN, **changes)  # type: ignore[arg-type]


def test_names_are_taken_once() -> None:
    with pytest.raises(TfqcError, match="two kernels have this name"):
        source([PLAIN, PLAIN])


@pytest.mark.parametrize(
    ("arguments", "because"),
    [
        ((4, "token", (8, 8)), "share their scale"),
        ((16, "token"), "copied, without scales"),
        ((4, "step", None, 8), "multiple of 16, at most 128"),
        ((4, "token", None, 16), "whose scale is known before"),
        ((4, "step", (8, 8), 16), "whose scale is known before"),
        ((16, "step", None, 16), "whose scale is known before"),
    ],
)
def test_what_no_quantizer_can_do_is_refused_in_one_sentence(arguments: tuple[object, ...], because: str) -> None:
    with pytest.raises(TfqcError, match=because):
        Quantize("tfqc_q", 32, *arguments)  # type: ignore[arg-type]
