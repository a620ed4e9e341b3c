"""Tensors for which there is no room lie in files, and are the same."""

from __future__ import annotations

import errno
import os
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn

import tfqc
from tfqc.codegen.artifact import Artifact
from tfqc.files import spill
from tfqc.files.spill import spilled


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x + self.time(time.float()[:, None])[:, None])))


def in_file(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().filename is not None


@pytest.fixture()
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory left."""
    monkeypatch.setattr(spill.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.int64])
def test_values_and_shapes_are_kept(dtype: torch.dtype, full: None) -> None:
    tensor = torch.randint(0, 2, (3, 2**20, 2)).to(dtype).transpose(0, 2)
    made = spilled(tensor, [])
    assert in_file(made) and made.dtype == dtype and torch.equal(made, tensor)
    made.zero_()  # it is the program's own, and writable
    assert bool(tensor.any())


def test_only_what_has_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 << 20))
    tensor, other = torch.zeros(2 << 20, dtype=torch.uint8), torch.zeros(3 << 20, dtype=torch.uint8)
    assert spilled(tensor, []) is tensor
    assert in_file(spilled(tensor, [other]))
    small = torch.zeros(100)
    assert spilled(small, [other, other]) is small
    meta = torch.zeros(9 << 20, device="meta")
    assert spilled(meta, [other]) is meta


def test_a_full_disk_leaves_it_in_memory(monkeypatch: pytest.MonkeyPatch, full: None) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tensor = torch.zeros(2 << 20)
    assert spilled(tensor, []) is tensor


@pytest.mark.parametrize("target", ["fake-quant{weights=4}", "cpu-int8", "cuda-int4{mode=w4a16}"])
def test_a_compile_without_memory_gives_the_same_bytes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = Small().eval(), {"x": torch.randn(2, 3, 64), "time": torch.tensor([1, 2])}

    def compiled() -> Artifact:
        return tfqc.compile(model, target, schedule=DDIMScheduler(), steps=2, calibration=2, example_inputs=inputs)

    before = compiled()
    monkeypatch.setattr(spill, "SMALL", 1)
    monkeypatch.setattr(spill.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    after = compiled()
    assert before.files() == after.files()
    spilt = [any(map(in_file, chain(*(file.values() for file in a.tensors.values())))) for a in (before, after)]
    assert spilt == [False, True]
