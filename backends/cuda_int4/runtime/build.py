"""Compiling kernels with nvcc, or with NVRTC where there is no toolkit, and reading the machine code that comes out."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tfqc.errors import TfqcError

Kind = Literal["ptx", "cubin"]

_STANDARD = "-std=c++17"


class BuildError(TfqcError):
    """Kernels cannot be compiled here: what is missing, or what the compiler says."""


class MissingCompilerError(BuildError):
    """There is neither nvcc nor NVRTC."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it; shared memory that is asked for at launch is not in it."""

    registers: int
    spills: int  # bytes a thread stores and loads
    stack: int  # bytes a thread
    shared: int  # bytes a block, static


@dataclass(frozen=True)
class Compiled:
    """PTX as UTF-8 text, a cubin, or a fat binary; and what the compiler said."""

    image: bytes
    log: str

    def resources(self) -> dict[str, Resources]:
        """By kernel; empty for PTX, which has no registers yet, and for a fat binary, where each chip has its own."""
        found: dict[str, Resources] = {}
        for part in self.log.split("Compiling entry function '")[1:]:
            found[part.partition("'")[0]] = Resources(
                _number(r"Used (\d+) registers", part),
                _number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part),
                _number(r"(\d+) bytes stack frame", part),
                _number(r"(\d+) bytes smem", part),
            )
        return found


def compile(source: str, arch: str, kind: Kind = "cubin") -> Compiled:
    """A .cu text for one architecture (sm_80, sm_90a, ...).

    Raises:
        MissingCompilerError: there is no compiler.
        BuildError: it refuses the text.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        verbose = ["-Xptxas", "-v"] if kind == "cubin" else []
        return _with_nvcc(nvcc, source, [f"-arch={arch}", f"-{kind}", *verbose])
    return _with_nvrtc(_nvrtc(), source, arch, kind)


def fatbin(source: str, targets: Sequence[str]) -> Compiled:
    """A .cu text as one image for many chips: machine code for each sm_.., PTX for each compute_...

    Raises:
        MissingCompilerError: there is no nvcc; NVRTC makes no fat binaries.
        BuildError: it refuses the text.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingCompilerError("There is no nvcc, which alone makes fat binaries: put that of a toolkit on PATH.")
    codes = [f"-gencode=arch={target.replace('sm', 'compute')},code={target}" for target in targets]
    return _with_nvcc(nvcc, source, ["-fatbin", "--threads=0", *codes])


def version() -> str:
    """The compiler that `compile` uses, and its version.

    Raises:
        MissingCompilerError: there is none.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return _version_of_nvcc(nvcc)
    major, minor, library = ctypes.c_int(), ctypes.c_int(), _nvrtc()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"NVRTC {major.value}.{minor.value}"


def disassemble(cubin: bytes) -> str | None:
    """The machine code of a cubin as nvdisasm writes it, with labels; None if there is no nvdisasm."""
    tool = _tool("nvdisasm")
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as work:
        file = Path(work, "kernels.cubin")
        file.write_bytes(cubin)
        return _call([tool, "-c", str(file)], "nvdisasm refuses the cubin").stdout


def _with_nvcc(nvcc: str, source: str, options: Sequence[str]) -> Compiled:
    with tempfile.TemporaryDirectory() as work:
        text, made = Path(work, "kernels.cu"), Path(work, "kernels.image")
        text.write_text(source)
        done = _call([nvcc, _STANDARD, *options, str(text), "-o", str(made)], _REFUSED)
        return Compiled(made.read_bytes(), done.stderr)


@functools.cache
def _version_of_nvcc(nvcc: str) -> str:
    return _call([nvcc, "--version"], f"{nvcc} is no compiler").stdout


def _with_nvrtc(library: ctypes.CDLL, source: str, arch: str, kind: Kind) -> Compiled:
    program = ctypes.c_void_p()
    options = [_STANDARD, f"--gpu-architecture={arch if kind == 'cubin' else arch.replace('sm', 'compute')}"]
    if kind == "cubin":
        options.append("--ptxas-options=-v")
    flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(options), flags)
        log = _text(library, program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise BuildError(f"{_REFUSED}: {log.strip()[:2000]}")
        if kind == "cubin":
            return Compiled(_text(library, program, "CUBIN"), log)
        return Compiled(_text(library, program, "PTX").rstrip(b"\0"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


_REFUSED = "The CUDA compiler refuses the kernels"


def _nvrtc() -> ctypes.CDLL:
    """NVRTC of the nvidia-cuda-nvrtc package."""
    for folder in _package_folders():
        for file in sorted(folder.glob("lib/libnvrtc.so.*")):
            for second in folder.glob("lib/libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(second))  # it looks for it by name only, where the system has its libraries
            return ctypes.CDLL(str(file))
    raise MissingCompilerError(
        "There is no CUDA compiler: put nvcc of a CUDA toolkit on PATH, or `pip install nvidia-cuda-nvrtc`."
    )


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, library[f"nvrtcGet{what}Size"](program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, library[f"nvrtcGet{what}"](program, text))
    return text.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BuildError(f"NVRTC fails: {library.nvrtcGetErrorString(status).decode()}.")


@functools.cache
def _package_folders() -> tuple[Path, ...]:
    """Folders of NVIDIA's packages for CUDA 13, whatever of them is installed."""
    try:
        found = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        return ()
    return tuple(Path(p) for p in found.submodule_search_locations or ()) if found else ()


def _tool(name: str) -> str | None:
    """A program of NVIDIA's, on PATH or in its package."""
    inside = (folder / "bin" / name for folder in _package_folders())
    return shutil.which(name) or next((str(file) for file in inside if file.exists()), None)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def _call(command: list[str], failed: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{failed}: {(done.stderr or done.stdout).strip()[:2000]}")
    return done
