"""What the compiler makes of every body on every chip: registers, spills, and the instructions of the main loop."""

from __future__ import annotations

import functools

import pytest

from tfqc.backends.cuda_int4.build import Compiled, MissingCompilerError, compile, disassemble
from tfqc.backends.cuda_int4.sass import Listing, count, listings, opcode
from tfqc.backends.cuda_int4.specialise import ARCHS, Epilogue, Gemm, Kernel, Mode, Quantize, Window, body_for, source

MODES: tuple[Mode, ...] = ("w4a4", "w4a8")
# What a block may ask for, of what a multiprocessor has: two blocks have to fit. 1 kB of each is the driver's.
SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_120a": 100}

EPILOGUES = {
    "sums": Epilogue("one", out="s32"),
    "plain": Epilogue("step", bias="step"),
    "tokens": Epilogue("token", bias="one", residual=True),
    "silu": Epilogue("step", bias="step", activation="silu", residual=True),
    "gelu": Epilogue("step", bias="one", activation="gelu", out="u4"),
    "geglu": Epilogue("token", bias="step", activation="geglu", residual=True, out="u8", out_scales="one"),
}
QUANTIZERS = (
    Quantize("tfqc_values", 640, 4),
    Quantize("tfqc_odd_values", 70, 8),
    Quantize("tfqc_tokens_4", 640, 4, "token"),
    Quantize("tfqc_pixels", 320, 8, "step", (32, 32)),
)


def gemms(arch: str) -> list[Gemm]:
    """Whole tiles and tails along N and K, every epilogue, both strides; each once for each mode."""
    found: list[Gemm] = []
    for mode in MODES:
        body = body_for(arch, mode)
        found += [Gemm(f"tfqc_{mode}_{name}", 1280, 640, mode, body, end) for name, end in EPILOGUES.items()]
        found.append(Gemm(f"tfqc_{mode}_tails", 70, 672, mode, body, EPILOGUES["silu"]))
        found += [
            Gemm(f"tfqc_{mode}_window{stride}", 320, 9 * 320, mode, body, EPILOGUES["plain"], Window(32, 32, stride))
            for stride in (1, 2)
        ]
    return found


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
    for name, used in resources.items():
        assert (used.spills, used.stack, used.shared) == (0, 0, 0), name
        assert used.registers <= (128 if name.startswith("tfqc_w4") else 40), name
    for kernel in gemms(arch):
        assert 2 * (kernel.shared_bytes + 1024) <= SHARED[arch] * 1024


@pytest.mark.parametrize("arch", ARCHS)
def test_the_main_loop_multiplies_as_often_as_the_tile_says(arch: str) -> None:
    for kernel in gemms(arch):
        loop = code(arch)[kernel.name].main_loop()
        assert count(loop, "IMMA") == kernel.multiplies, kernel.name
        shape = "IMMA.16864.U4.S4" if kernel.body == "s4" else "IMMA.16832.U8.S8"
        assert {opcode(line) for line in loop if "IMMA" in line} == {shape}
        # 16 rows of 32 bytes of a, or 16 columns by 64 codes of w, each time; one store of 16 bytes for each copy.
        assert count(loop, "LDSM") == 4 * kernel.tile.row_bytes // 32
        assert count(loop, "LDS") == 2 * kernel.tile_k // 64
        assert count(loop, "LDGSTS") * 16 * kernel.threads == kernel.shared_bytes // kernel.tile.stages
        assert count(loop, "BAR") == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_the_main_loop_does_little_else(arch: str) -> None:
    for kernel in gemms(arch):
        loop = code(arch)[kernel.name].main_loop()
        # The nibble body of w4a4 has 96 instructions that take codes apart and 48 that shift, for its 64.
        most = {"s4": 3.0, "nibble": 4.7 if kernel.mode == "w4a4" else 4.0}[kernel.body]
        assert len(loop) / kernel.multiplies <= most, kernel.name


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
