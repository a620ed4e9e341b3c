"""Built kernels, kept in the user's cache, and which of them a device loads.

nvcc makes one fat binary of all targets. NVRTC, which makes none, makes an image for each, which lie side by side.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tfqc.backends.cuda_int4.runtime import build
from tfqc.backends.cuda_int4.runtime.specialise import ARCHS
from tfqc.errors import TfqcError
from tfqc.runtime.kept import kept

PTX = "compute_80"  # which the driver compiles for chips that came later
TARGETS = (*ARCHS, PTX)


def images(source: str, targets: Sequence[str] = TARGETS) -> dict[str, bytes]:
    """What a device loads, by target; with nvcc they are all the same fat binary.

    Raises:
        MissingCompilerError: there is no compiler.
        BuildError: it refuses the text.
    """
    compiler = build.version()
    if shutil.which("nvcc") is not None:
        image = _kept((compiler, *targets, source), "fatbin", lambda: build.fatbin(source, targets).image)
        return dict.fromkeys(targets, image)

    def made(target: str) -> bytes:
        kind = "ptx" if target == PTX else "cubin"
        arch = target.replace("compute", "sm")
        return _kept((compiler, target, source), kind, lambda: build.compile(source, arch, kind).image)

    return {target: made(target) for target in targets}


def fitting(made: Mapping[str, bytes], arch: str) -> bytes:
    """The image of `images` that a device of `arch` loads.

    Raises:
        TfqcError: there is none.
    """
    return made[target_for(arch, made)]


def target_for(arch: str, targets: Iterable[str] = TARGETS) -> str:
    """What a chip runs: its own machine code, that of an earlier one of its generation, or else PTX.

    Code for sm_90a and sm_120a runs on those alone.

    Raises:
        TfqcError: none of the targets runs on it.
    """
    targets = set(targets)
    if arch in targets:
        return arch
    generation, minor = _numbers(arch)
    earlier = [
        (number, target)
        for target in targets
        if target.startswith("sm_") and not target.endswith("a")
        for other, number in [_numbers(target)]
        if other == generation and number <= minor
    ]
    if earlier:
        return max(earlier)[1]
    if PTX in targets and (generation, minor) >= _numbers(PTX):
        return PTX
    raise TfqcError(f"The kernels do not run on {arch}: they are for {', '.join(sorted(targets))}.")


def _numbers(target: str) -> tuple[int, int]:
    """Major and minor compute capability: the last digit is the minor one."""
    number = int(re.sub(r"\D", "", target))
    return number // 10, number % 10


def _kept(key: Sequence[str], kind: str, make: Callable[[], bytes]) -> bytes:
    def write(file: Path) -> None:
        file.write_bytes(make())

    return kept(key, f".{kind}", write).read_bytes()
