"""Compilers: nvcc and NVRTC make the same of a text, it is kept, and who is missing or refuses says so in one line."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfqc.backends.cuda_int4.runtime import build
from tfqc.backends.cuda_int4.runtime.build import BuildError, Compiled, MissingCompilerError, Resources
from tfqc.backends.cuda_int4.runtime.images import TARGETS, fitting, images, target_for
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Quantize, source
from tfqc.errors import TfqcError
from tfqc.runtime import cache as built_kernels

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


SMALL = source([Quantize("tfqc_codes", 128, 8)])
AUTO = Gemm("tfqc_product", 128, 128, "w4a4", "auto")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return built_kernels.cache_directory()


def entries(fatbin: bytes) -> Iterator[tuple[str, int]]:
    """Kind and compute capability of what is in a fat binary."""
    magic, _, at, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50
    end = at + size
    while at < end:
        kind, _, head, size = struct.unpack_from("<HHIQ", fatbin, at)
        yield {1: "ptx", 2: "cubin"}[kind], struct.unpack_from("<I", fatbin, at + 28)[0]
        at += head + size


def test_nvcc_makes_one_image_of_all_targets(cache: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    made = images(source([AUTO]))
    assert list(made) == list(TARGETS)
    (image,) = set(made.values())
    chips = [("cubin", chip) for chip in (80, 86, 89, 90, 120)]
    assert sorted(entries(image)) == [*chips, ("ptx", 80)]
    assert [file.read_bytes() for file in cache.iterdir()] == [image]


def test_nvrtc_makes_an_image_for_each_target(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    try:
        made = images(source([AUTO]))
    except MissingCompilerError as error:
        pytest.skip(str(error))
    assert sorted(file.suffix for file in cache.iterdir()) == [".cubin"] * 5 + [".ptx"]
    assert all(image.startswith(b"\x7fELF") for target, image in made.items() if target != "compute_80")
    assert b".target sm_80" in made["compute_80"] and b"m16n8k64" in made["compute_80"]
    assert fitting(made, "sm_87") == made["sm_86"]
    with pytest.raises(MissingCompilerError, match="no nvcc, which alone makes fat binaries"):
        build.fatbin(SMALL, TARGETS)


def test_what_was_built_is_not_built_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "version", lambda: "compiler 1")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    built: list[str] = []

    def compile(text: str, arch: str, kind: str) -> Compiled:
        built.append(arch)
        return Compiled(f"{arch} {kind}".encode(), "")

    monkeypatch.setattr(build, "compile", compile)
    assert images(SMALL, ("sm_86", "compute_80")) == {"sm_86": b"sm_86 cubin", "compute_80": b"sm_80 ptx"}
    assert images(SMALL, ("sm_86",)) == {"sm_86": b"sm_86 cubin"}
    assert built == ["sm_86", "sm_80"]
    images(SMALL + "//", ("sm_86",))
    monkeypatch.setattr(build, "version", lambda: "compiler 2")
    images(SMALL, ("sm_86",))
    assert built == ["sm_86", "sm_80", "sm_86", "sm_86"]
    assert len(list(cache.iterdir())) == 4  # and nothing that was written on the way

    cache_file = cache.parent / "file"
    cache_file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_file))  # no directory can be made there
    for _ in range(2):
        assert images(SMALL, ("sm_89",)) == {"sm_89": b"sm_89 cubin"}
    assert built[4:] == ["sm_89"]
    built_kernels._own_directory().cleanup()
    built_kernels._own_directory.cache_clear()


@pytest.mark.parametrize(
    ("arch", "target"),
    [
        *((target, target) for target in TARGETS[:-1]),
        ("sm_87", "sm_86"),  # Orin
        ("sm_100", "compute_80"),
        ("sm_103", "compute_80"),
        ("sm_121", "compute_80"),  # code for 120a runs on 12.0 alone
    ],
)
def test_a_chip_loads_code_of_its_generation_or_else_ptx(arch: str, target: str) -> None:
    assert target_for(arch) == target


def test_an_older_chip_is_refused() -> None:
    with pytest.raises(TfqcError, match=r"^The kernels do not run on sm_75: they are for compute_80, sm_120a, "):
        target_for("sm_75")
    with pytest.raises(TfqcError, match=r"do not run on sm_90a: they are for sm_86\.$"):
        target_for("sm_90a", ["sm_86"])
