"""learn-time-scales: rows that are the networks', less error than single steps, and rows for any other timestep."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models import Example
from tests.passes.test_calibrate_activations import context
from tests.subjects import Subjects, assert_text_round_trip, of_example
from tfqc.analysis.weighted import tib_weighted
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.interpret import interpreter
from tfqc.ir.program import TIME, Program
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer, RowSource
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.time_scales import Networks, TimeScales, rows

QUICK = "iterations=40 bits=4"
LOWERED = "calibrate-activations{bits=4},calibrate-weights,fold-cache,hoist-request,insert-qdq"


def networks_of(program: Program) -> tuple[TimeScales, Networks]:
    row = program.table(TimeScales)["0"]
    return row, Networks(**{k: program.tensors[name] for k, name in row.networks.items()})


@pytest.mark.parametrize("name", ["unet-sd", "dit-labels", "chain", "sd3"])
def test_the_rows_are_the_networks(name: str, subject: Subjects, tmp_path: Path) -> None:
    its = subject(name)
    ctx = context(its, tmp_path)
    program = its.run(f"select-maintenance{{strategy=tib}},learn-time-scales{{{QUICK}}}", ctx)
    row, networks = networks_of(program)
    assert ctx.schedule is not None
    scales, zero_points = rows(networks, ctx.schedule.timesteps)
    for i, (scale, zero_point) in enumerate(zip(row.scales, row.zero_points, strict=True)):
        assert torch.equal(program.tensors[scale], scales[i]) and scales.dtype == torch.float32
        assert torch.equal(program.tensors[zero_point], zero_points[i])
        assert program.table(RowSource)[scale].kind == "activation"
    named = {r.input_scale for r in program.table(Quantizer).values()}
    assert named == set(row.scales)
    assert int(zero_points.min()) >= 0 and int(zero_points.max()) <= 15
    assert all(r.input_bits == 4 and not r.input_top for r in program.table(Quantizer).values())
    assert_text_round_trip(program, its.call([951.0, 37.0]))


@contextlib.contextmanager
def half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


class Growing(nn.Module):
    """Linears whose inputs grow with the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.outer(self.inner(x * (0.05 + t.float() / 1000)[:, None])))


def growing() -> Example:
    torch.manual_seed(0)
    return Growing().requires_grad_(False), {"x": torch.randn(2, 32), "t": torch.tensor([7, 421])}


@pytest.mark.parametrize("optimizer", ["adam", "stquant"])
def test_less_error_than_single_steps(optimizer: str, tmp_path: Path) -> None:
    """Steps follow their inputs: nearly as good as the best step of each time, and far better than one for all."""
    its = of_example("growing", growing)
    ctx = context(its, tmp_path, steps=10, images=16)
    program = its.run(f"learn-time-scales{{bits=4 iterations=300 optimizer={optimizer}}}", ctx)
    learned, single, each = (float(ctx.remarks[-1].numbers[name]) for name in ("learned", "single", "each"))
    assert each <= learned < 1.2 * each < 0.2 * single
    for row in program.table(Quantizer).values():
        scale = program.tensors[row.input_scale]
        assert len(scale.unique()) == len(scale) and float(scale.max()) > 8 * float(scale.min())


def test_what_training_does_not_help_has_one_step(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    program = its.run("learn-time-scales{iterations=1 learning-rate=1000}", ctx)
    assert ctx.remarks[-1].numbers["learned"] == pytest.approx(ctx.remarks[-1].numbers["single"], rel=1e-3)
    assert all(len(program.tensors[r.input_scale].unique()) == 1 for r in program.table(Quantizer).values())


def test_a_new_timestep_gets_the_row_of_the_networks(subject: Subjects, tmp_path: Path) -> None:
    """Nothing is fitted again: @time computes the same as `rows`, bit for bit, in batches of any size."""
    its = subject("unet-sd")
    learned = its.run(f"select-maintenance,learn-time-scales{{{QUICK}}}", context(its, tmp_path))
    row, networks = networks_of(learned)
    program = its.run(LOWERED, context(its, tmp_path), learned.clone())
    assert not program.table(TimeScales)
    assert_text_round_trip(program, its.call([951.0, 37.0]))
    assert {program.table(RowSource)[n].kind for n in row.scales} == {"table"}
    run = interpreter(program)
    run(**its.call([333.0, 750.0]))
    run(**its.call([12.0]))
    new = rows(networks, [333.0])[0], rows(networks, [12.0])[0]
    for i, name in enumerate(row.scales):
        found = run.get_tensor(name)
        assert torch.equal(found[:4], learned.tensors[name])
        assert torch.equal(found[-2:], torch.cat([new[0][i], new[1][i]]))


@pytest.mark.parametrize(("maintenance", "policy"), [("fold", "nearest"), ("tib", "recompute"), ("fold", "error")])
def test_what_is_kept_of_the_networks(maintenance: str, policy: str, subject: Subjects, tmp_path: Path) -> None:
    """Where no row is ever added, nothing; where the block stays in the step, @time has the networks alone."""
    its = subject("unet2d")
    text = f"select-maintenance{{strategy={maintenance}}},learn-time-scales{{{QUICK}}},"
    program = its.run(text + LOWERED.replace("fold-cache", f"fold-cache{{policy={policy}}}"), context(its, tmp_path))
    assert any("tdq" in name for name in program.tensors) == (policy == "recompute")
    assert (TIME in program.functions) == (policy == "recompute")
    if policy == "recompute":
        program(**its.call([333.0]))


@pytest.mark.parametrize(("grid", "top"), [("full", 15), ("released", 12)])
def test_grids(grid: str, top: int, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    text = f"select-maintenance,learn-time-scales{{{QUICK} grid={grid}}}"
    learned = its.run(text, context(its, tmp_path))
    rows_of = learned.table(Quantizer)
    row = rows_of[next(n for n in rows_of if learned.origins[n].module == "conv_in")]
    centre = learned.tensors[row.input_zero_point].unique().tolist()
    assert centre == [8 if grid == "full" else 6] and row.input_top == (0 if grid == "full" else 12)
    program = its.run(LOWERED, context(its, tmp_path), learned)
    limits = {int(n) for n in re.findall(r"tfqc\.quantize\.default\(.*, 0, (\d+)\)", render(program))}
    assert limits == ({15} if grid == "full" else {12, 14})
    assert top in limits


def test_what_is_left_alone(subject: Subjects, tmp_path: Path) -> None:
    """Inputs that are planned otherwise or have parameters; then those of the block alone."""
    its = subject("unet-sd")
    ctx = context(its, tmp_path)
    planned = its.run("plan-quantization{weights=none activations=4 mode=per-step activation-method=mse}", ctx)
    same = its.run("learn-time-scales", ctx, planned.clone())
    assert render(same) == render(planned) or not same.table(Quantizer)
    program = its.run(
        f"select-maintenance{{strategy=tib}},learn-time-scales{{{QUICK} scope=tib}},calibrate-activations{{bits=8}}",
        ctx,
    )
    block = {n.name for n in tib_weighted(program)}
    assert {n: r.input_bits for n, r in program.table(Quantizer).items()} == {
        n: 4 if n in block else 8 for n in program.table(Quantizer)
    }
    before = render(program)
    assert render(its.run("learn-time-scales", ctx, program)) == before


def test_as_planned_with_protected_steps(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    plan = "plan-quantization{activations=4 mode=per-step activation-method=tdq first-steps=1}"
    text = f"select-maintenance,{plan},learn-time-scales{{iterations=20}}"
    program = its.run(text, context(its, tmp_path))
    table = program.table(Quantizer)
    assert table and all(program.tensors[r.input_protected].flatten().tolist() == [True, False, False, False]
                         for r in table.values())  # fmt: skip


@pytest.mark.parametrize("around", [torch.inference_mode, half_by_default])
def test_what_a_caller_has_set_changes_nothing(around: Any, tmp_path: Path) -> None:
    its = of_example("growing", growing)
    ctx = context(its, tmp_path)
    want = its.run(f"learn-time-scales{{{QUICK}}}", ctx)
    with around():
        got = its.run(f"learn-time-scales{{{QUICK}}}", ctx)
    assert all(torch.equal(got.tensors[name], tensor) for name, tensor in want.tensors.items())


def test_where_all_that_is_looked_at_is_protected_nothing_is_clipped(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    plan = "plan-quantization{activations=4 mode=per-step activation-method=tdq first-steps=1}"
    ctx = context(its, tmp_path)
    program = its.run(f"select-maintenance,{plan},learn-time-scales{{steps=1 iterations=20}}", ctx)
    row = next(r for n, r in program.table(Quantizer).items() if program.origins[n].module == "conv_in")
    assert float(program.tensors[row.input_scale].min()) * 7 > 3  # noise of the first step


def test_a_schedule_of_one_step_has_one_step_for_all_times(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    text = f"select-maintenance,learn-time-scales{{{QUICK}}},{LOWERED}"
    program = its.run(text, context(its, tmp_path, steps=1))
    assert not any("tdq" in name for name in program.tensors)
    assert torch.isfinite(torch.as_tensor(program(**its.call([333.0]))[0])).all()


def test_what_is_planned_so_and_not_learned_says_what_it_is(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    plan = "plan-quantization{activations=4 mode=per-step activation-method=tdq}"
    program = its.run(f"select-maintenance,{plan},calibrate-activations", context(its, tmp_path))
    assert {r.input_how for r in program.table(Quantizer).values() if r.input_how} == {"per-step min-max"}


def test_refusals(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs a schedule"):
        its.run("learn-time-scales", Context())
    with pytest.raises(PipelineError, match=r"needs a calibration"):
        its.run("learn-time-scales")
    for option, why in [
        ("bits=2", "3 to 8 bits"),
        ("edge-bits=9", "3 to 8 bits"),
        ("iterations=0", "at least 1"),
        ("steps=0", "at least 1"),
        ("learning-rate=0", "positive number"),
        ("grid=half", "full"),
    ]:
        with pytest.raises(SpecError, match=why):
            Pipeline.parse(f"learn-time-scales{{{option}}}")
    program = its.program
    name = "conv_in.weight"
    program.tensors[name] = program.tensors[name].clone().fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"NaN or infinit"):
        its.run("learn-time-scales", context(its, tmp_path), program)
