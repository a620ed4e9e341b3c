"""Building kernels with g++, once for each source text and instruction set; the result is kept in the user's cache.

`CXX` names another compiler, with arguments if it needs any (`ccache g++`). `TFQC_KERNEL_CHECKS=bounds` builds kernels
that check what they are told and what they take, and end the process where it is wrong; with `sanitize`, g++'s address
and undefined-behaviour sanitizers check every access as well (their run times have to be preloaded).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import subprocess
import warnings
from pathlib import Path

import torch

from tfqc.runtime.kept import kept
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
    "amx": {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16"},
}
_NEEDS["avx512_vnni"] |= _NEEDS["avx2"]
_NEEDS["amx"] |= _NEEDS["avx512_vnni"]
_DEBUG = {
    "": ["-O3"],
    "bounds": ["-O3", "-DTFQC_CHECK"],
    "sanitize": ["-O1", "-g", "-DTFQC_CHECK", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


class BuildError(RuntimeError):
    """Kernels cannot be built here: what is missing, or what the compiler says."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Features of this CPU, as Linux names them; where Linux does not say, what torch's own kernels use of them."""
    try:
        found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return frozenset(found.group(1).split())
    return frozenset({"avx2", "fma"} if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else ())


@functools.cache
def amx_is_granted() -> bool:
    """True if the kernel lets this process use the registers of AMX: not every one does, whatever the CPU has."""
    if os.uname().machine != "x86_64":
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def why_not(isa: str) -> str:
    """Why kernels for an instruction set, or with `auto` for any, do not run here; empty if they do."""
    if isa not in (*ISAS, "auto"):
        return f"There are no kernels for the instructions that were asked for ({isa}), but for {', '.join(ISAS)}."
    if lacks := sorted(_NEEDS[ISAS[-1] if isa == "auto" else isa] - cpu_flags()):
        return f"This CPU has not the instructions that the kernels need ({isa}): {', '.join(lacks)}."
    if isa == "amx" and not amx_is_granted():
        return "The kernel of this system does not let the process use the registers of AMX (amx)."
    return ""


def runs_here(isa: str) -> bool:
    """True if this CPU has the instruction set, and the system lets it be used."""
    return not why_not(isa)


def best_isa() -> str | None:
    """The best instruction set of `ISAS` that runs here; None if none does."""
    return next(filter(runs_here, ISAS), None)


def build_best(source: str, isa: str) -> tuple[str, ctypes.CDLL]:
    """The instruction set and the library of a source text: `isa`, or a lesser one if the compiler refuses it.

    Raises:
        BuildError: there is no compiler, or it refuses all of them.
    """
    _compiler()
    first: BuildError | None = None
    for each in (isa, *(lesser for lesser in ISAS[ISAS.index(isa) + 1 :] if runs_here(lesser))):
        try:
            library = build(source, each)
        except BuildError as error:
            first = first or error
            continue
        if first is not None:
            warnings.warn(f"{first} The kernels use {each} instead of {isa}.", stacklevel=4)
        return each, library
    assert first is not None
    raise first


def build(source: str, isa: str) -> ctypes.CDLL:
    """The shared library of a source text.

    It is looked up by the hash of text, flags and compiler, and written beside its place and renamed, so several
    processes may build it at once; one that cannot be loaded is built again. OpenMP symbols are left open: they bind
    to the run time that torch has loaded, so its threads are ours.

    Raises:
        BuildError: no compiler, or it refuses the text, or what it makes cannot be loaded.
    """
    compiler = _compiler()
    debug = os.environ.get("TFQC_KERNEL_CHECKS", "")
    if debug not in _DEBUG:
        raise BuildError(f"TFQC_KERNEL_CHECKS={debug} is none of {', '.join(filter(None, _DEBUG))}.")
    flags = ["-std=c++17", *_DEBUG[debug], "-fPIC", "-fopenmp", "-fno-math-errno", "-Wall", *_FLAGS[isa].split()]
    if isa == "avx512_vnni" and "avx512_bf16" in cpu_flags():
        flags.append("-mavx512bf16")
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]

    def make(library: Path) -> None:
        text, made = library.with_suffix(".cpp"), library.with_suffix(".o")
        text.write_text(source)
        # -nodefaultlibs would drop libgcc; only libgomp, which -fopenmp adds, has to stay out of the link.
        _call([*compiler, *flags, "-c", str(text), "-o", str(made)])
        _call([*compiler, "-shared", *sanitizers, "-o", str(library), str(made)])

    key = [_version(compiler), *compiler, *flags, source]
    failed = ""
    for _ in range(2):
        try:
            library = kept(key, ".so", make)
        except OSError as error:
            raise BuildError(f"The kernels cannot be built: {error}.") from error
        try:
            return ctypes.CDLL(str(library))
        except OSError as error:
            failed = f"The kernels that {compiler[0]} made cannot be loaded: {error}."
        with contextlib.suppress(OSError):
            library.unlink()
    raise BuildError(failed)


def _compiler() -> tuple[str, ...]:
    """The command that compiles."""
    try:
        program, *arguments = shlex.split(os.environ.get("CXX") or "g++") or ["g++"]
    except ValueError as error:
        raise BuildError(f"CXX is no command: {error}.") from error
    if (found := shutil.which(program)) is None:
        raise BuildError("There is no g++ (nor what CXX names) to build the kernels with.")
    return found, *arguments


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    done = _run([*compiler, "--version"])
    if done.returncode:
        raise BuildError(f"{compiler[0]} is no compiler to build the kernels with.")
    return done.stdout


def _call(command: list[str]) -> None:
    done = _run(command)
    if done.returncode:
        raise BuildError(f"{command[0]} refuses the kernels: {done.stderr.strip()[:2000]}")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:  # found, but not to be run here
        raise BuildError(f"{command[0]} is no compiler to build the kernels with: {error}.") from error


def source_of(*names: str) -> str:
    """The text of kernel files of this package, with their own headers put in where they are first included."""
    return joined(Path(__file__).parents[1] / "kernels", *names)
