"""Loaded engines of cpu-int8, and the least that compiles."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import first
from tests.lowered import EXACT, example, finished
from tests.subjects import Subject
from tfqc.backends.cpu_int8.runtime.build import best_isa
from tfqc.backends.cpu_int8.runtime.engine import Engine
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.ir.program import Program

BATCHES = ([750.0], [500.0, 500.0], [0.0, 750.0, 250.0], [33.0])
built = pytest.mark.skipif(
    best_isa() is None or shutil.which("g++") is None, reason="no CPU or no compiler for kernels"
)


def chosen_isa() -> str | None:
    """The instruction set of models that are loaded here."""
    return os.environ.get("TFQC_ISA") or best_isa()


def save(program: Program, out: Path, target: str = "cpu-int8") -> Path:
    """The artifact of a lowered program."""
    parsed = Target.parse(target)
    artifact = parsed.backend.emit(program, parsed.options)
    artifact.facts |= {"backend": parsed.name, "target": str(parsed)}
    return artifact.save(out)


def made(its: Subject, out: Path, target: str = EXACT, **recipe: str) -> tuple[Program, Engine]:
    """A lowered program and its engine."""
    program = finished(its, target, **recipe)
    loaded = load(save(program, out, target))
    assert isinstance(loaded, Engine)
    return program, loaded


def differ(want: Any, got: Any) -> float:
    """‖a − b‖ / ‖a‖. One code that rounding turns the other way moves small models by percents."""
    a, b = first(want), first(got)
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).norm() / a.norm())


@built
class Odd(nn.Module):
    """The least that compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.conv, self.last = nn.Linear(1, 4), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(F.silu(self.conv(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None]))


ODD = example(Odd, 2, 4, 4)
