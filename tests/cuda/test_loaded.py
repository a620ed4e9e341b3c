"""Kernels on a device, which here is a libcuda over host memory: what torch's tensors become in a launch."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cuda import stub
from tfqc.backends.cuda_int4.runtime import loaded
from tfqc.backends.cuda_int4.runtime.loaded import Loaded
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Quantize, source

GEMM, QUANTIZE = Gemm("tfqc_product", 64, 64, "w4a4", "s4"), Quantize("tfqc_codes", 64, 4)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is launched; kernels are not built, and torch has a stream."""
    monkeypatch.setenv("TFQC_LIBCUDA", str(stub.build(tmp_path)))
    stub.tell(monkeypatch, log=tmp_path / "log")
    monkeypatch.setattr(loaded, "images", lambda text, targets: {target: b"image" for target in targets})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=4096 + index))
    return tmp_path / "log"


def test_arguments_are_the_kernels_in_order(log: Path) -> None:
    given = {name: torch.zeros(2) for name in GEMM.arguments[:-1]} | dict.fromkeys(("residual", "low", "up"))
    kernels = Loaded(source([GEMM, QUANTIZE]), 0)
    kernels.launch(GEMM, 300, given)
    codes = {name: torch.zeros(2) for name in QUANTIZE.arguments[:-1]}
    kernels.launch(QUANTIZE, 5, codes)
    product, quantize = log.read_text().splitlines()
    pointers = " ".join("0" if t is None else str(t.data_ptr()) for t in given.values())
    assert product == (
        f"tfqc_product grid 3 1 1 block {GEMM.threads} 1 1 shared {GEMM.shared_bytes} stream 4096"
        f" arguments {pointers} 300"
    )
    pointers = " ".join(str(t.data_ptr()) for t in codes.values())
    assert quantize == f"tfqc_codes grid 1 1 1 block 256 1 1 shared 0 stream 4096 arguments {pointers} 5"


@pytest.mark.parametrize("capability", [86, 87, 90])
def test_a_chip_that_emulates_the_instructions_is_warned_of(
    log: Path, monkeypatch: pytest.MonkeyPatch, capability: int
) -> None:
    stub.tell(monkeypatch, capability=capability)
    given = {name: torch.zeros(2) for name in GEMM.arguments[:-1]}
    kernels = Loaded(source([GEMM]), 0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(2):
            kernels.launch(GEMM, 1, given)
    said = ["These kernels are for chips with 4-bit products, which sm_90a emulates, slowly: compile for arch=fat."]
    assert [str(w.message) for w in found] == (said if capability == 90 else [])
