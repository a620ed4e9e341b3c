"""Debug builds of the kernels: faults put in on purpose are found, and a few kernels run clean under the sanitizers.

`make sanitize` runs all tests of kernels that way.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.engines import built
from tfqc.backends.cpu_int8.runtime.build import best_isa

ROOT = Path(__file__).parents[2]


def sanitizers() -> str:
    """Their run times, which have to be loaded before all else; empty if g++ has none."""
    names = ("libasan.so", "libubsan.so")
    if shutil.which("g++") is None:
        return ""
    found = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    return " ".join(map(str.strip, found)) if all(os.path.isabs(path) for path in found) else ""


def run(script: str, debug: str, preload: str = "") -> subprocess.CompletedProcess[str]:
    """Runs Python code with what a debug build needs."""
    its = {"TFQC_KERNEL_CHECKS": debug, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **its}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


sanitized = pytest.mark.skipif(not sanitizers() or best_isa() is None, reason="no sanitizers, or no kernels")

PRODUCT = """
import torch
from tests.backends import test_cpu_int8_gemm as gemm, test_cpu_int8_maps as maps
from tests.backends.kernels import *
isa = {isa!r}
"""
CLEAN = """
gemm.linear(isa, 2, 21, 70, 33, 0, out=gemm.BF16, residual=gemm.F32, gate=True)
gemm.linear(isa, 1, 17, 130, 64, 0, 2, act=abi.Act.GEGLU, out=gemm.U8, per_token=True)
gemm.conv(isa, 2, (9, 7), 96, 20, (3, 3), 2, 1, 2, 0)
print("clean")
"""
WRONG = """
x, out = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 16)
scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
weight, ones, sums = torch.zeros(1, 1, 16, 16, 4, dtype=torch.int8), torch.ones(16), torch.zeros(16, dtype=torch.int32)
args = abi.LinearArgs(
    x=x.data_ptr(), ldx={ldx}, batch=1, seq={seq}, k=64, n=16, quant=abi.Quant(by_row(scale), by_row(zero)),
    weight=weight.data_ptr(), weight_scale=ones.data_ptr(), weight_sum=sums.data_ptr(),
    epilogue=abi.Epilogue(out=out.data_ptr(), out_ld=16),
)
run(isa, "linear", args, [0], 1, {scratch})
print("not seen")
"""


@sanitized
def test_kernels_are_clean() -> None:
    done = run(PRODUCT.format(isa=best_isa()) + CLEAN, "sanitize", sanitizers())
    assert done.stdout == "clean\n", done.stderr[-3000:]


@sanitized
def test_the_sanitizer_sees_a_read_beyond_a_tensor() -> None:
    wrong = WRONG.format(ldx=64, seq=5, scratch=4 << 20)
    done = run(PRODUCT.format(isa=best_isa()) + wrong, "sanitize", sanitizers())
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "not seen" not in done.stdout


@built
@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"ldx": 63, "seq": 4, "scratch": 4 << 20}, "a.ldx >= a.k"),
        ({"ldx": 64, "seq": 4, "scratch": 4096}, "next <= end"),
    ],
)
def test_what_kernels_are_told_is_checked(wrong: dict[str, int], said: str) -> None:
    done = run(PRODUCT.format(isa=best_isa()) + WRONG.format(**wrong), "bounds")
    assert said in done.stderr and "does not hold" in done.stderr and "not seen" not in done.stdout
