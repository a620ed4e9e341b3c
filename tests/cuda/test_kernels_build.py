"""Compilers: nvcc and NVRTC make the same of a text, and a missing or refusing one says so in a sentence."""

from __future__ import annotations

import shutil

import pytest

from tfqc.backends.cuda_int4 import build
from tfqc.backends.cuda_int4.build import BuildError, Compiled, MissingCompilerError, Resources
from tfqc.backends.cuda_int4.specialise import Gemm, Quantize, source

KERNELS = (Gemm("tfqc_product", 128, 128, "w4a4", "s4"), Quantize("tfqc_codes", 128, 4))


def without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nvcc" else which(name))


def test_nvrtc_compiles_where_there_is_no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    try:
        made = build.compile(source(KERNELS), "sm_86")
    except MissingCompilerError as error:
        pytest.skip(str(error))
    assert made.image.startswith(b"\x7fELF")
    assert {name: (r.spills, r.stack) for name, r in made.resources().items()} == {
        "tfqc_product": (0, 0),
        "tfqc_codes": (0, 0),
    }
    ptx = build.compile(source(KERNELS), "sm_86", "ptx").image.decode()
    assert ".target sm_86" in ptx and "m16n8k64" in ptx and "\0" not in ptx
    with pytest.raises(BuildError, match=r'refuses the kernels: (.|\n)*identifier "nothing" is undefined'):
        build.compile("__device__ int x = nothing;", "sm_86")


def test_nvcc_says_what_is_wrong() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    with pytest.raises(BuildError, match=r'refuses the kernels: (.|\n)*identifier "nothing" is undefined'):
        build.compile("__device__ int x = nothing;", "sm_86", "ptx")


def test_without_a_compiler_one_sentence_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    monkeypatch.setattr(build, "_package_folders", tuple)
    with pytest.raises(
        MissingCompilerError, match=r"^There is no CUDA compiler: put nvcc .* on PATH, or `pip install nvidia-"
    ):
        build.compile("", "sm_86")


def test_without_a_disassembler_there_is_no_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "_package_folders", tuple)
    assert build.disassemble(b"") is None


def test_resources_are_read_from_what_ptxas_says() -> None:
    log = (
        "ptxas info    : Compiling entry function 'one' for 'sm_86'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 122 registers, used 1 barriers, 8 bytes cumulative stack size, 64 bytes smem\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_86'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 24 registers, used 0 barriers\n"
    )
    assert Compiled(b"", log).resources() == {"one": Resources(122, 28, 8, 64), "two": Resources(24, 0, 0, 0)}
