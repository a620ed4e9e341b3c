"""calibrate-activations: ranges that hold what flows, per step where asked, from one trajectory an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tests.subjects import Subject, Subjects, assert_text_round_trip, calibration
from tfqc.analysis.weighted import weighted_nodes
from tfqc.calibration.trajectories import Trajectories
from tfqc.calibration.watch import Watch
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer, RowSource
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.grid import Grid, fake_quantize, range_to_qparams
from tfqc.sampling.schedule import SamplingSchedule


def context(its: Subject, workdir: Path, steps: int = 4, **others: Any) -> Context:
    schedule = SamplingSchedule.of(DDIMScheduler(clip_sample=False), steps)
    return Context(schedule=schedule, calibration=calibration(its, **others), workdir=workdir)


def observed(program: Program, ctx: Context) -> dict[str, list[torch.Tensor]]:
    """Inputs of weighted nodes by value name, one tensor for each step."""
    from tfqc.calibration.simulate import Simulation

    seen: dict[str, list[torch.Tensor]] = {}
    step = 0
    inputs = {n.name: n.all_input_nodes[0].name for n in weighted_nodes(program)}

    def observe(name: str, value: torch.Tensor) -> None:
        rows = seen.setdefault(inputs[name], [torch.empty(0)] * len(ctx.schedule or ()))
        rows[step] = torch.cat([rows[step], value.flatten()])

    run = Simulation(program, program.step, observe=observe)
    for batch in Trajectories(program, ctx):
        for step, call in batch.calls(program):  # noqa: B007
            run.call(call)
    return seen


@pytest.mark.parametrize(("mode", "intervals"), [("static", 0), ("per-step", 0), ("per-step", 2)])
def test_min_max(mode: str, intervals: int, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    ctx = context(its, tmp_path)
    options = f"bits=4 mode={mode} intervals={intervals}"
    text = f"select-maintenance{{strategy=tib}},calibrate-activations{{{options}}}"
    program = its.run(text, ctx, numerics=mode == "static")
    seen = observed(its.program, ctx)
    grid = Grid(4, symmetric=False)
    wide = 0
    for name, row in program.table(Quantizer).items():
        value = program.node(name).all_input_nodes[0].name
        scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
        groups = [seen[value]]
        if scale.numel() > 1:
            wide += 1
            assert scale.shape == zero_point.shape == (4,)
            assert row.input_scale in program.table(RowSource)
            groups = [[s] for s in seen[value]] if not intervals else [seen[value][:2]] * 2 + [seen[value][2:]] * 2
        want = [range_to_qparams(torch.cat(g).min(), torch.cat(g).max(), grid) for g in groups]
        assert torch.equal(scale, torch.stack([s for s, _ in want]))
        assert torch.equal(zero_point, torch.stack([z for _, z in want]))
    per_request = sum("attn2.to_k" in program.origins[n].module or "attn2.to_v" in program.origins[n].module
                      for n in program.table(Quantizer))  # fmt: skip
    assert per_request == 8
    assert wide == (0 if mode == "static" else len(program.table(Quantizer)) - per_request)
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_mse_is_not_worse(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    seen = observed(its.program, ctx)

    def errors(method: str) -> dict[str, float]:
        program = its.run(f"select-maintenance{{strategy=tib}},calibrate-activations{{bits=3 method={method}}}", ctx)
        found: dict[str, float] = {}
        for name, row in program.table(Quantizer).items():
            value = program.node(name).all_input_nodes[0].name
            x = torch.cat(seen[value])
            scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
            found[value] = float((fake_quantize(x, scale, zero_point, Grid(3, False)) - x).abs().pow(2.4).sum())
        return found

    plain, searched = errors("min-max"), errors("mse")
    assert sum(searched.values()) < 0.95 * sum(plain.values())


def test_per_token(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program = its.run("select-maintenance{strategy=tib},calibrate-activations{mode=per-token}", context(its, tmp_path))
    for name, row in program.table(Quantizer).items():
        linear = "linear" in str(program.node(name).target)
        assert (row.input_how == "per-token") == linear
        assert bool(row.input_scale) != linear
        assert linear or len(program.tensors[row.input_scale]) == len(
            its.timesteps
        )  # convolutions: a row for each step


def test_skip_and_second_runs(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    program = its.run("select-maintenance{strategy=tib},calibrate-activations{bits=8 skip=conv_in,mid_block}", ctx)
    modules = {program.origins[n].module for n in program.table(Quantizer)}
    assert modules and not any(m.startswith(("conv_in", "mid_block")) for m in modules)
    text = render(its.run("calibrate-activations{bits=8 skip=conv_in,mid_block}", ctx, program.clone()))
    assert text == render(program)  # unchanged
    before = dict(program.table(Quantizer))
    its.run("calibrate-activations{bits=4}", ctx, program)
    after = program.table(Quantizer)
    assert {n: after[n] for n in before} == before
    assert {r.input_bits for n, r in after.items() if n not in before} == {4}
    scales = {(r.input_scale, r.input_bits) for r in after.values()}
    assert len({s for s, _ in scales}) == len(scales)  # a value with 8 and with 4 bits has two scales


def test_same_twice_and_no_more_calls(subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T network calls for each batch of images, for any number of passes; and the same result again."""
    its = subject("unet-sd")
    calls: list[int] = []
    plain = Watch.__call__
    monkeypatch.setattr(Watch, "__call__", lambda self, **k: calls.append(1) or plain(self, **k))
    text = ("calibrate-finite-set{scope=all},select-maintenance,calibrate-activations,calibrate-weights,"
            "calibrate-activations{mode=per-step}")  # fmt: skip
    results = []
    for _ in range(2):
        program = its.program
        Pipeline.parse(text).run(program, context(its, tmp_path))
        results.append(program)
    assert len(calls) == 4 * 2  # 4 steps, 3 images in batches of 2
    a, b = results
    assert render(a) == render(b)
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_refusals(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs a calibration"):
        its.run("select-maintenance,calibrate-activations")
    with pytest.raises(PipelineError, match=r"#2 .* needs a diffusers scheduler, not bare timesteps"):
        its.run("select-maintenance,calibrate-activations", its.context(calibration=calibration(its), workdir=tmp_path))
    for option, why in [("bits=1", "2 to 8 bits"), ("intervals=-1", "negative")]:
        with pytest.raises(SpecError, match=why):
            Pipeline.parse(f"calibrate-activations{{{option}}}")
    program = its.program
    program.tensors["conv_in.bias"] = program.tensors["conv_in.bias"].clone().fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"full-precision model returns NaN or infinity at timestep 750"):
        its.run("select-maintenance{strategy=tib},calibrate-activations", context(its, tmp_path), program)


def test_text_without_its_data(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    ctx = context(its, tmp_path)
    assert ctx.calibration is not None
    cond = ctx.calibration.cond
    object.__setattr__(ctx.calibration, "cond", {**cond, "encoder_hidden_stats": cond["encoder_hidden_states"]})
    with pytest.raises(
        CalibrationError, match=r"stats' is no input of the model. Did you mean 'encoder_hidden_states'"
    ):
        its.run("select-maintenance{strategy=tib},calibrate-activations", ctx)
    object.__setattr__(ctx.calibration, "cond", {})
    with pytest.raises(CalibrationError, match=r"calibration data have no 'encoder_hidden_states'"):
        its.run("select-maintenance{strategy=tib},calibrate-activations", ctx)
