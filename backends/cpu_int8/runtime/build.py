"""Building kernels with g++, once for each source text and instruction set; the result is kept in the user's cache."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from tfqc.runtime.cache import kept
from tfqc.runtime.sources import joined

ISAS = ("amx", "avx512_vnni", "avx2")  # best first

_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
_FLAGS = {
    "avx2": "-mavx2 -mfma",
    "avx512_vnni": f"-mavx2 -mfma {_AVX512}",
    "amx": f"-mavx2 -mfma {_AVX512} -mavx512bf16 -mamx-tile -mamx-int8 -mamx-bf16",
}
_NEEDS = {
    "avx2": {"avx2", "fma"},
    "avx512_vnni": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
    "amx": {"amx_tile", "amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16"},
}


class BuildError(RuntimeError):
    """Kernels cannot be built here: what is missing, or what the compiler says."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Features of this CPU, as Linux names them."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return frozenset(found.group(1).split()) if found else frozenset()


def best_isa() -> str | None:
    """The best instruction set of `ISAS` that this CPU has; None if it has none."""
    return next((isa for isa in ISAS if _NEEDS[isa] <= cpu_flags()), None)


def runs_here(isa: str) -> bool:
    """True if this CPU has the instruction set."""
    return isa in ISAS and _NEEDS[isa] <= cpu_flags()


def build(source: str, isa: str) -> ctypes.CDLL:
    """The shared library of a source text.

    It is looked up by the hash of text, flags and compiler, and written beside its place and renamed, so several
    processes may build it at once. OpenMP symbols are left open: they bind to the run time that torch has loaded, so
    its threads are ours.

    Raises:
        BuildError: no compiler, or it refuses the text.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise BuildError("There is no g++ (nor what CXX names) to build the kernels with.")
    flags = ["-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-Wall", *_FLAGS[isa].split()]
    if isa == "avx512_vnni" and "avx512_bf16" in cpu_flags():
        flags.append("-mavx512bf16")

    def make(library: Path) -> None:
        text = library.with_suffix(".cpp")
        text.write_text(source)
        # -nodefaultlibs would drop libgcc; only libgomp, which -fopenmp adds, has to stay out of the link.
        compile_only = [f for f in flags if f != "-shared"]
        _call([compiler, *compile_only, "-c", str(text), "-o", str(text.with_suffix(".o"))])
        _call([compiler, "-shared", "-o", str(library), str(text.with_suffix(".o"))])

    return ctypes.CDLL(str(kept([_version(compiler), *flags, source], ".so", make)))


@functools.cache
def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{compiler} is no compiler to build the kernels with.")
    return done.stdout


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} refuses the kernels: {done.stderr.strip()[:2000]}")


def source_of(*names: str) -> str:
    """The text of kernel files of this package, with their own headers put in where they are first included."""
    return joined(Path(__file__).parents[1] / "kernels", *names)
