"""CUDA C++ to PTX, with nvcc or with the NVRTC of PyPI, whichever is there; kept by content in a temporary folder."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Compiler:
    """`identity` changes with the compiler's version; `compile` gives the PTX of a source for an architecture."""

    identity: str
    compile: Callable[[str, str], str]


def nvcc() -> Compiler | None:
    home = os.environ.get("CUDA_HOME", "")
    path = shutil.which("nvcc", path=f"{home}/bin") if home else None
    path = path or shutil.which("nvcc")
    if path is None:
        return None

    def compile_(source: str, arch: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cu")
            file.write_text(source)
            command = [path, "-ptx", "-O3", "-std=c++17", f"-arch={arch}", "-o", f"{folder}/kernel.ptx", str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return Path(folder, "kernel.ptx").read_text()

    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return Compiler(version, compile_)


def _nvidia_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    return [folder for root in roots or [] for folder in sorted(Path(root).iterdir()) if folder.is_dir()]


def nvrtc() -> Compiler | None:
    """The `nvidia-cuda-nvrtc` package; headers of CUDA are there only with `nvidia-cuda-runtime`."""
    folders = _nvidia_folders()
    found = [so for f in folders for so in sorted(f.glob("lib/libnvrtc.so.*")) if ".alt." not in so.name]
    if not found:
        return None
    for builtins in found[-1].parent.glob("libnvrtc-builtins.so.*"):  # which the library looks for by name
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(found[-1]))
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    includes = [f"-I{f / 'include'}" for f in folders if (f / "include").is_dir()]

    def text_of(program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(library, f"nvrtcGet{what}")(program, buffer)
        return buffer.value.decode()

    def compile_(source: str, arch: str) -> str:
        program = ctypes.c_void_p()
        library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
        options = [f"--gpu-architecture={arch.replace('sm_', 'compute_')}", "--std=c++17", *includes]
        flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            if library.nvrtcCompileProgram(program, len(options), flags):
                raise RuntimeError(text_of(program, "ProgramLog"))
            return text_of(program, "PTX")
        finally:
            library.nvrtcDestroyProgram(ctypes.byref(program))

    return Compiler(f"nvrtc {major.value}.{minor.value} {found[-1].stat().st_size}", compile_)


@functools.cache
def compiler() -> Compiler | None:
    return nvcc() or nvrtc()


def compile_ptx(source: str, arch: str = "sm_80", using: Compiler | None = None) -> str:
    """The PTX of a source; skips the test that asks for it where there is no compiler."""
    using = using or compiler()
    if using is None:
        pytest.skip("neither nvcc nor the package nvidia-cuda-nvrtc is here to compile the kernels of the tests")
    folder = Path(tempfile.gettempdir(), f"tfqc-ptx-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    key = hashlib.sha256("\0".join((using.identity, arch, source)).encode()).hexdigest()
    file = folder / f"{key}.ptx"
    if not file.exists():
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as new:
            new.write(using.compile(source, arch))
        os.replace(new.name, file)
    return file.read_text()
