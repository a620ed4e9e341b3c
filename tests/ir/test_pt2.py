"""Programs as .pt2 files: torch.export.load gives what the program gives, bit for bit, without tfqc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tfqc
from tests.cli.conftest import TINY, Tfqc
from tests.cli.conftest import tfqc as command
from tests.cli.factories import tiny
from tfqc.errors import IRError, TfqcError
from tfqc.ir.flat import nested
from tfqc.ir.program import Program, Role
from tfqc.ir.pt2 import example_arguments
from tfqc.ir.store import save_program
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline

call_tfqc = command  # the fixture, in this module
TIMES = (900.0, 421.0, 7.0)
FOLD = "select-maintenance{strategy=STRATEGY},fold-cache,hoist-request"


def calls(program: Program, images: int, times: list[float]) -> dict[str, Any]:
    """Arguments of so many images, noise in what is floating point."""
    generator = torch.Generator().manual_seed(images)
    example = dict(zip([i.name for i in program.inputs], pytree.tree_leaves(example_arguments(program)), strict=True))
    values: dict[str, Tensor] = {}
    for item in program.inputs:
        value = example[item.name]
        rows = value[:1].expand(images, *value.shape[1:]) if item.type.shape[:1] == ("B",) else value
        noise = torch.randn(rows.shape, generator=generator).to(rows.dtype)
        values[item.name] = noise if rows.is_floating_point() else rows.clone()
        if item.role is Role.TIME:
            values[item.name] = torch.tensor(times).to(item.type.dtype)
    return nested(program, values)


def check(program: Program, file: Path, times: tuple[float, ...] = TIMES) -> set[str]:
    program.save_pt2(file)
    loaded = torch.export.load(file)
    module = loaded.module()
    for images, now in ((2, [times[1]] * 2), (3, [times[2], *times[:2]])):
        given = calls(program, images, now)
        with torch.no_grad():
            wanted, found = (pytree.tree_leaves(f(**given)) for f in (program, module))
        assert len(wanted) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    return {str(n.target) for n in loaded.graph.nodes if n.op == "call_function"}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("unet2d-classes", "none"),
        ("unet2d-classes", "cache8"),
        ("unet-sdxl", "fold"),
        ("dit", "fold"),
        ("dit", "cache8"),
    ],
)
def test_it_computes_what_the_program_computes(
    name: str, strategy: str, discovered: Callable[[str], Program], tmp_path: Path
) -> None:
    """Nested arguments, labels with rows of their own, what is computed once for each image."""
    program = discovered(name)
    if strategy != "none":
        context = Context(schedule=tfqc.SamplingSchedule(TIMES))
        Pipeline.parse(FOLD.replace("STRATEGY", strategy)).run(program, context)
    check(program, tmp_path / "p.pt2")


@pytest.mark.parametrize("target", ["fake-quant{weights=4}", "cpu-int8"])
def test_quantized_and_lowered_programs_are_aten_alone(target: str, tmp_path: Path) -> None:
    artifact = tfqc.compile(tiny(), target, steps=3, calibration=2)
    tensors = {k: v for file in artifact.tensors.values() for k, v in file.items()}
    found = check(tfqc.parse(artifact.texts["program.ir"], tensors), tmp_path / "p.pt2", (666.0, 333.0, 0.0))
    assert not any("tfqc" in name for name in found)
    code = f"import sys, torch; torch.export.load({str(tmp_path / 'p.pt2')!r}); assert 'tfqc' not in sys.modules"
    alone = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # torch imports an installed tfqc otherwise
    subprocess.run([sys.executable, "-c", code], check=True, env=alone)


def test_a_time_of_no_row_is_computed_as_the_nearest(tmp_path: Path) -> None:
    spec = tiny()
    program = tfqc.capture(spec.model, spec.example_inputs)
    passes = f"normalize,discover-tib,{FOLD.replace('STRATEGY', 'fold')}"
    Pipeline.parse(passes).run(program, Context(schedule=tfqc.SamplingSchedule(TIMES)))
    program.save_pt2(tmp_path / "p.pt2")
    module = torch.export.load(tmp_path / "p.pt2").module()
    x = torch.randn(2, 2, 4, 4)
    near, row, other = (module(sample=x, timestep=torch.tensor([t, t])) for t in (400, 421, 7))
    assert torch.equal(near, row) and not torch.equal(near, other)


def test_what_is_refused(tmp_path: Path) -> None:
    spec = tiny()
    program = tfqc.capture(spec.model, spec.example_inputs)
    with pytest.raises(IRError, match=r"x\.onnx is no name for an exported program: give it one that ends in \.pt2"):
        program.save_pt2(tmp_path / "x.onnx")
    (tmp_path / "file").write_text("")
    with pytest.raises(IRError, match="cannot be written"):
        program.save_pt2(tmp_path / "file" / "x.pt2")
    program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    with pytest.raises(TfqcError, match="captured without weights, so it cannot be exported"):
        program.save_pt2(tmp_path / "x.pt2")


def test_the_command_takes_artifacts_programs_and_models(call_tfqc: Tfqc, tmp_path: Path) -> None:
    assert call_tfqc("compile", TINY, "--steps", "3", "--calibration-images", "2", "--out", tmp_path / "out").code == 0
    spec = tiny()
    save_program(tfqc.capture(spec.model, spec.example_inputs), tmp_path / "p.ir")
    for subject, stage in ((TINY, "normalized"), (tmp_path / "out", "lowered"), (tmp_path / "p.ir", "captured")):
        done = call_tfqc("export", subject, "--out", tmp_path / "x.pt2", "--json")
        assert done.code == 0, done.err
        assert done.json["stage"] == stage
        module = torch.export.load(tmp_path / "x.pt2").module()
        assert module(sample=torch.zeros(3, 2, 4, 4), timestep=torch.zeros(3, dtype=torch.int64)).shape == (3, 2, 4, 4)


def test_a_model_without_a_time(tmp_path: Path) -> None:
    model = torch.nn.Conv2d(3, 3, 1)
    program = tfqc.capture(model, {"input": torch.randn(2, 3, 4, 4)}, roles={"input": "sample"})
    check(tfqc.Pipeline.parse("normalize,discover-tib").run(program), tmp_path / "out.pt2")
