"""reconstruct-weights: GPTQ outside the TIB, nearer to the full-precision model than rounding to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import args_of, first
from tests.subjects import Subjects, assert_text_round_trip, calibration
from tfqc.analysis.weighted import weight_of, weighted_nodes
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.moments import Moments
from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import Trajectories
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.frontend import capture
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer, Tib
from tfqc.models.find import find_model
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.gptq import gptq
from tfqc.quant.grid import QuantizedWeight
from tfqc.sampling.schedule import SamplingSchedule

TIB = "select-maintenance{strategy=tib}"


def fashion_context(tmp_path: Path) -> Context:
    spec = find_model("fashion-unet")
    return Context(SamplingSchedule.of(spec.scheduler, 3), spec.calibration(4, batch_size=4), workdir=tmp_path)


def test_is_nearer_than_nearest(tmp_path: Path) -> None:
    spec = find_model("fashion-unet")
    ctx = fashion_context(tmp_path)
    start = Pipeline.parse(f"normalize,discover-tib,{TIB}").run(capture(spec.model, spec.example_inputs), ctx)
    assert ctx.calibration is not None and ctx.schedule is not None
    call = {
        "sample": ctx.calibration.latents,
        "timestep": torch.tensor(int(ctx.schedule.timesteps[1])),
        "encoder_hidden_states": ctx.calibration.cond["encoder_hidden_states"],
    }
    errors: dict[str, float] = {}
    for name, text in (("gptq", "reconstruct-weights{steps=3},calibrate-weights{bits=4 method=mse}"),
                       ("nearest", "calibrate-weights{bits=4 method=mse}")):  # fmt: skip
        lowered = Pipeline.parse(f"{text},fold-cache,insert-qdq").run(start.clone(), ctx)
        with torch.no_grad():
            errors[name] = float(F.mse_loss(first(lowered(**call)), first(start(**call))))
        if name == "gptq":
            assert_text_round_trip(lowered, call)
    assert errors["gptq"] < 0.6 * errors["nearest"]


def test_touches_everything_but_the_tib(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    ctx = Context(SamplingSchedule.of(find_model("fashion-unet").scheduler, 2), calibration(its), workdir=tmp_path)
    program = its.run(f"{TIB},reconstruct-weights{{bits=4 edge-bits=8}}", ctx)
    rows = program.table(Quantizer)
    assert set(rows) == {n.name for n in weighted_nodes(program)} - set(program.table(Tib))
    assert [r.weight_bits for r in rows.values()] == [8, *[4] * (len(rows) - 2), 8]
    text = render(program)
    assert render(its.run("reconstruct-weights", ctx, program)) == text  # what is quantized stays


def test_moments_are_those_of_the_unfolded_inputs(subject: Subjects, tmp_path: Path) -> None:
    """For a linear and a strided convolution, against the layer itself: E[(Wx)²] = W H Wᵀ."""
    its = subject("unet-sd")
    ctx = Context(SamplingSchedule.of(find_model("fashion-unet").scheduler, 2), calibration(its), workdir=tmp_path)
    program = its.program
    nodes = [n for n in weighted_nodes(program) if n.name not in program.table(Tib)]
    strided = next(n for n in nodes if "conv2d" in str(n.target) and [2, 2] in args_of(n))
    linear = next(n for n in nodes if "linear" in str(n.target))
    wishes = {n.name: (n.all_input_nodes[0].name, Moments.of(program, n, 2, looks=2)) for n in (strided, linear)}
    moments = observe(program, wishes, ctx)
    for node in (strided, linear):
        weight = program.tensors[weight_of(node) or ""]
        squares: list[torch.Tensor] = []

        def keep(name: str, value: torch.Tensor, node=node, weight=weight, squares=squares) -> None:  # type: ignore[no-untyped-def]
            if name == node.name:
                conv = weight.dim() == 4
                out = F.conv2d(value, weight, None, *args_of(node)[3:]) if conv else F.linear(value, weight)
                rows = out.movedim(1, -1) if conv else out
                squares.append(rows.reshape(-1, len(weight)).double().square())

        run = Simulation(program, program.step, observe=keep)
        with torch.no_grad():
            for batch in Trajectories(program, ctx):
                for _, inputs in batch.calls(program):
                    run.call(inputs)
        flat = weight.flatten(1).double()
        want = torch.cat(squares).mean(0)
        torch.testing.assert_close((flat @ moments[node.name] * flat).sum(1), want, rtol=1e-4, atol=1e-7)


def test_refused(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs a calibration"):
        its.run(f"{TIB},reconstruct-weights")
    with pytest.raises(SpecError, match=r"bits=9 is out of range"):
        Pipeline.parse("reconstruct-weights{bits=9}")
    broken = its.program
    node = next(n for n in weighted_nodes(broken) if n.name not in broken.table(Tib))
    name = weight_of(node) or ""
    broken.tensors[name] = broken.tensors[name].clone().index_fill_(0, torch.tensor([0]), float("nan"))
    ctx = Context(SamplingSchedule.of(find_model("fashion-unet").scheduler, 2), calibration(its), workdir=tmp_path)
    with pytest.raises(CalibrationError, match=r"NaN"):
        its.run(f"{TIB},reconstruct-weights", ctx, broken)


def test_goes_on_behind_the_last_rounded_layer(
    subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was rounded is found by the next command, if nothing of what it is made of has changed."""
    its = subject("unet-sd")
    ctx = Context(SamplingSchedule.of(find_model("fashion-unet").scheduler, 2), calibration(its), workdir=tmp_path)
    rounded: list[str] = []

    def counted(weight: Tensor, moments: Tensor, nearest: QuantizedWeight) -> QuantizedWeight:
        rounded.append("one")
        return gptq(weight, moments, nearest)

    monkeypatch.setattr("tfqc.passes.reconstruct_weights.gptq", counted)
    first_run = its.run(f"{TIB},reconstruct-weights{{bits=4}}", ctx)
    count = len(rounded)
    files = sorted(tmp_path.glob("rounded-*"))
    assert count == len(files) > 10
    files[0].unlink()
    files[1].write_bytes(b"broken")
    again = its.run(f"{TIB},reconstruct-weights{{bits=4}}", ctx)
    assert len(rounded) == count + 2
    assert all(torch.equal(t, first_run.tensors[n]) for n, t in again.tensors.items())
    its.run(f"{TIB},reconstruct-weights{{bits=3}}", ctx)
    assert len(rounded) == 2 * count + 2
