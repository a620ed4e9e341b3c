"""What each rewriting pass does, on one screen: `golden/<pass>.ir` is a pass, a program before it, and after it.

`TFQC_UPDATE_GOLDENS=1 python -m pytest tests/passes/test_golden.py` writes what comes after anew: look at the diff.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tfqc import registry
from tfqc.instruments import VerifyEach
from tfqc.ir import Program, parse, render
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule

FILES = sorted(Path(__file__).with_name("golden").glob("*.ir"))
# Passes that write tables and parameters, and no operation.
TABLES_ALONE = {
    "discover-tib", "plan-quantization", "measure-disturbance", "select-maintenance", "calibrate-weights",
    "calibrate-activations", "calibrate-finite-set", "reconstruct-tib", "reconstruct-weights",
    "learn-time-scales", "reconstruct-blocks",
}  # fmt: skip
CUT = "---\n"


def values(program: Program) -> dict[str, Tensor]:
    """Seeded values of declared tensors: scales are positive, codes are of 4 bits, zero points 0."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, tensor in sorted(program.tensors.items()):
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=generator) + 0.5
            made[name] = (value if name.endswith("scale") else value - 1).to(tensor.dtype)
        else:
            made[name] = torch.randint(0, 1 if "zero_point" in name else 8, tensor.shape, generator=generator).to(
                tensor.dtype
            )
    return made


def after(item: str, before: str) -> str:
    """The program of a text behind a pass."""
    program = parse(before, values(parse(before)))
    assert render(program) == before, "the text before is not as it would be printed"
    ctx = Context(schedule=SamplingSchedule((750.0, 250.0)))
    return render(Pipeline.parse(item).run(program, ctx, [VerifyEach()]))


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_a_pass_rewrites_as_it_stands_there(file: Path) -> None:
    item, _, texts = file.read_text().partition("\n")
    before, _, wanted = texts.partition(CUT)
    found = after(item, before)
    assert item.partition("{")[0] == file.stem
    assert found != before
    if os.environ.get("TFQC_UPDATE_GOLDENS"):
        file.write_text(f"{item}\n{before}{CUT}{found}")
    else:
        assert found == wanted


def test_every_pass_that_rewrites_has_a_golden_on_one_screen() -> None:
    assert {f.stem for f in FILES} == registry.PASSES.keys() - TABLES_ALONE
    assert [f.stem for f in FILES if len(f.read_text().splitlines()) > 60] == []
