"""What the compiler makes of every body on every chip: registers, spills, and the instructions of the main loop."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

from tfqc.backends.cuda_int4.runtime.build import Compiled, MissingCompilerError, compile, disassemble
from tfqc.backends.cuda_int4.runtime.specialise import (
    ARCHS,
    Epilogue,
    Gemm,
    Kernel,
    Mode,
    Quantize,
    Tile,
    Window,
    body_for,
    source,
)
from tfqc.backends.cuda_int4.sass import Listing, count, listings, opcode

MODES: tuple[Mode, ...] = ("w4a4", "w4a8")
# What a block may ask for, of what a multiprocessor has: two blocks have to fit. 1 kB of each is the driver's.
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_120a": 100}

EPILOGUES = {
    "sums": Epilogue("one", out="s32"),
    "plain": Epilogue("step", bias="step"),
    "tokens": Epilogue("token", bias="one", residual=True),
    "silu": Epilogue("step", bias="step", activation="silu", residual=True),
    "gelu": Epilogue("step", bias="one", activation="gelu", out="u4"),
    "gelu_tanh": Epilogue("step", bias="one", activation="gelu_tanh", out="u8"),
    "geglu": Epilogue("token", bias="step", activation="geglu", residual=True, out="u8", out_scales="one"),
}
# Warps with more sums than 128 registers hold, and how many of their blocks a multiprocessor is to hold.
LARGE = {
    "square": (Tile(warp_n=64), 2),
    "wide": (Tile(n=160, stages=2, warp_m=32, warp_n=160), 2),
    "deep": (Tile(n=160, row_bytes=128, stages=2, warp_m=32, warp_n=160), 1),
    "tall": (Tile(m=224, row_bytes=128, stages=2, warp_m=112), 1),
}
QUANTIZERS = (
    Quantize("tfqc_values", 640, 4),
    Quantize("tfqc_odd_values", 70, 8),
    Quantize("tfqc_tokens_4", 640, 4, "token"),
    Quantize("tfqc_pixels", 320, 8, "step", (32, 32)),
    Quantize("tfqc_copies", 320, 16, image=(32, 32)),
    Quantize("tfqc_down_32", 640, 4, rank=32),
    Quantize("tfqc_down_128", 70, 8, rank=128),
)
# Instructions for each one that multiplies, at most. The nibble body of w4a4 has 96 instructions that take codes apart
# and 48 that shift, for its 64; f16 weights come from 9 instructions a register. Groups of codes have 4 for each sum.
INSTRUCTIONS = {("w4a4", "s4"): 3.0, ("w4a4", "nibble"): 4.7, ("w4a8", "nibble"): 4.0, ("w4a16", "half"): 4.3}
GROUPED = {("w4a4", "s4"): 11.3, ("w4a4", "nibble"): 8.7, ("w4a8", "nibble"): 13.0, ("w4a16", "half"): 4.8}


def gemms(arch: str) -> list[Gemm]:
    """Whole tiles and tails along N and K, every epilogue, both strides; each once for each mode of codes."""
    found: list[Gemm] = []
    for mode in MODES:
        body = body_for(arch, mode)
        found += [Gemm(f"tfqc_{mode}_{name}", 1280, 640, mode, body, end) for name, end in EPILOGUES.items()]
        found.append(Gemm(f"tfqc_{mode}_tails", 70, 672, mode, body, EPILOGUES["silu"]))
        found += [
            Gemm(f"tfqc_{mode}_window{stride}", 320, 9 * 320, mode, body, EPILOGUES["plain"], Window(32, 32, stride))
            for stride in (1, 2)
        ]
        for tile, (large, _) in LARGE.items():
            if mode == "w4a8" and large.n == 160 and large.row_bytes == 64:
                continue  # too few weights for its threads
            found += [
                Gemm(f"tfqc_{mode}_{tile}_{name}", 1280, 672, mode, body, EPILOGUES[name], None, large)
                for name in ("tokens", "geglu")
            ]
    return found + others(arch)


def others(arch: str) -> list[Gemm]:
    """Of f16 rows, of groups, and with a low rank."""
    if arch == "sm_86":
        return []  # what the compiler makes for sm_89
    half, plain, codes = ("w4a16", "half"), EPILOGUES["plain"], body_for(arch, "w4a4")
    whole, rows = Tile(row_bytes=128), Tile(row_bytes=128, stages=2)
    return [
        Gemm("tfqc_half", 1280, 640, *half, plain),
        Gemm("tfqc_half_geglu", 1280, 640, *half, EPILOGUES["geglu"]),
        Gemm("tfqc_half_tails", 70, 672, *half, EPILOGUES["silu"], tile=rows),
        Gemm("tfqc_half_window", 320, 9 * 320, *half, plain, Window(32, 32)),
        Gemm("tfqc_half_groups", 1280, 672, *half, plain, group=128),
        Gemm("tfqc_half_geglu_groups", 1280, 672, *half, EPILOGUES["geglu"], group=128),
        Gemm("tfqc_w4a4_groups", 1280, 672, "w4a4", codes, plain, group=128),
        Gemm("tfqc_w4a4_geglu_groups", 1280, 672, "w4a4", codes, EPILOGUES["geglu"], group=128),
        Gemm("tfqc_w4a8_groups", 1280, 672, "w4a8", "nibble", EPILOGUES["silu"], group=128),
        Gemm("tfqc_w4a4_rank", 1280, 640, "w4a4", codes, replace(EPILOGUES["tokens"], rank=32)),
        Gemm("tfqc_w4a4_tails_rank", 1280, 672, "w4a4", codes, replace(EPILOGUES["tokens"], rank=32)),
        Gemm("tfqc_w4a4_geglu_rank", 1280, 640, "w4a4", codes, replace(EPILOGUES["geglu"], rank=128)),
        Gemm("tfqc_w4a8_tails_rank", 70, 672, "w4a8", "nibble", replace(EPILOGUES["silu"], rank=32)),
        Gemm("tfqc_half_rank", 1280, 640, *half, replace(plain, rank=16)),
        Gemm("tfqc_w4a8_whole_groups", 1280, 672, "w4a8", "nibble", EPILOGUES["tokens"], tile=whole, group=128),
    ]


def main_loop(arch: str, kernel: Gemm) -> tuple[str, ...]:
    """With f16, of what multiplies it, which the reader of machine code does not look for."""
    listing = code(arch)[kernel.name]
    if kernel.mode == "w4a16":
        listing = replace(listing, lines=tuple(line.replace("HMMA.", "IMMA.") for line in listing.lines))
    return listing.main_loop()


@functools.cache
def compiled(arch: str) -> Compiled:
    kernels: list[Kernel] = [*gemms(arch), *QUANTIZERS]
    try:
        return compile(source(kernels), arch)
    except MissingCompilerError as error:
        pytest.skip(str(error))


@functools.cache
def code(arch: str) -> dict[str, Listing]:
    text = disassemble(compiled(arch).image)
    if text is None:
        pytest.skip("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return listings(text)


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_the_chip(arch: str) -> None:
    resources = compiled(arch).resources()
    assert set(resources) == {kernel.name for kernel in (*gemms(arch), *QUANTIZERS)}
    for kernel in (*gemms(arch), *QUANTIZERS):
        used = resources[kernel.name]
        shared = 4 * 16 * kernel.rank * 4 if isinstance(kernel, Quantize) else 0  # f32 of 16 rows of four warps
        assert (used.spills, used.stack, used.shared) == (0, 0, shared), kernel.name
        blocks = dict(LARGE.values()).get(kernel.tile, kernel.blocks) if isinstance(kernel, Gemm) else kernel.blocks
        assert blocks * (kernel.shared_bytes + 1024) <= SHARED[arch] * 1024
        if isinstance(kernel, Quantize):
            assert used.registers <= (168 if kernel.rank > 64 else 72 if kernel.rank else 40), kernel.name
        else:
            assert used.registers * kernel.threads * kernel.blocks <= 65536, kernel.name
            assert used.registers <= (255 if kernel.tile.large else 240 if kernel.blocks == 1 else 128), kernel.name


@pytest.mark.parametrize("arch", ARCHS)
def test_the_main_loop_multiplies_as_often_as_the_tile_says(arch: str) -> None:
    for kernel in gemms(arch):
        loop, tile = main_loop(arch, kernel), kernel.tile
        assert count(loop, "IMMA") == kernel.multiplies, kernel.name
        shapes = {"s4": "IMMA.16864.U4.S4", "nibble": "IMMA.16832.U8.S8", "half": "IMMA.16816.F32"}
        assert {opcode(line) for line in loop if "IMMA" in line} == {shapes[kernel.body]}
        # 16 rows of 32 bytes of a, or 16 columns by 64 codes of w (32 by 32 with f16), each time; terms of groups,
        # scales and sums of codes, or scales of f16; one store of 16 bytes for each copy of each thread.
        assert count(loop, "LDSM") == tile.warp_m // 16 * tile.row_bytes // 32
        terms = 0 if kernel.group is None else 1 + kernel.paired if kernel.mode == "w4a16" else 4
        assert count(loop, "LDS") == tile.warp_n // 32 * (kernel.tile_k // 32) + terms
        copied = 16 * kernel.threads
        weights = -(-tile.n * kernel.tile_k // 2 // copied)
        assert count(loop, "LDGSTS") == tile.m * tile.row_bytes // copied + weights + (kernel.group is not None)
        assert count(loop, "BAR") == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_the_main_loop_does_little_else(arch: str) -> None:
    for kernel in gemms(arch):
        most = (INSTRUCTIONS if kernel.group is None else GROUPED)[kernel.mode, kernel.body]
        assert len(main_loop(arch, kernel)) / kernel.multiplies <= most, kernel.name


@pytest.mark.parametrize("arch", ARCHS)
def test_low_ranks_take_their_instructions(arch: str) -> None:
    """16 rows by 8 columns of 64 x 32, in each turn of a loop or once; of 16 rows and 32 inputs."""
    for kernel in gemms(arch):
        if kernel.epilogue.rank and kernel.mode != "w4a16":
            assert count(code(arch)[kernel.name].lines, "HMMA") == 16, kernel.name
    for kernel in QUANTIZERS:
        assert count(code(arch)[kernel.name].lines, "HMMA") == kernel.rank // 8 * 2, kernel.name


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_emulated(arch: str) -> None:
    assert b"mma_sub_byte" not in compiled(arch).image
    for name, listing in code(arch).items():
        assert not any(opcode(line).startswith(("LDL", "STL")) for line in listing.lines), name


def test_the_reader_of_machine_code_finds_the_loop_that_multiplies() -> None:
    text = """
	.section	.text.k,"ax",@progbits
.text.k:
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/              @!PT LDS RZ, [RZ] ;
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/                   IMMA.16832.U8.S8 R8, R4.ROW, R6.COL, R8 ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0070*/                   EXIT ;
"""
    listing = listings(text)["k"]
    assert len(listing.lines) == 8
    assert [opcode(line) for line in listing.main_loop()] == ["LDS.128", "IMMA.16832.U8.S8", "BRA", "BRA"]
    nested = listings(text.replace("IADD3 R1, R1, 0x1, RZ", "IMMA R1").replace("(.L_x_1)", "(.L_x_0)"))["k"]
    with pytest.raises(ValueError, match="a loop in it"):
        nested.main_loop()
