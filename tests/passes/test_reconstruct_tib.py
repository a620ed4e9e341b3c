"""reconstruct-tib: TIAR lowers the features' error, keeps nearest otherwise, and touches nothing else."""

from __future__ import annotations

import re

import pytest
import torch

from tests.subjects import Subjects, assert_text_round_trip, calibration
from tfqc.analysis.weighted import tib_weighted, weight_of
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.rows import Disturbance, Quantizer
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.grid import Grid, quantize_weight
from tfqc.quant.parameters import stored_weight


@pytest.mark.parametrize("name", ["unet-sd", "unet2d-scale-shift", "dit-labels", "chain"])
def test_less_error_than_nearest(name: str, subject: Subjects) -> None:
    its = subject(name)
    ctx = its.context(calibration=calibration(its))
    enough = 600 if name == "chain" else 150  # its product with a matrix has six columns, in 3 bits
    text = (
        f"reconstruct-tib{{bits=3 iterations={enough}}},measure-disturbance{{weights=3 activations=8 strategies=tib}}"
    )
    program = its.run(text, ctx)
    (line,) = [r for r in ctx.report if r.startswith("TIAR")]
    before, after = map(float, re.findall(r"loss (\S+) .*?, (\S+) reconstructed", line)[0])
    assert after < 0.8 * before
    tib = tib_weighted(its.program)
    assert set(program.table(Quantizer)) == {n.name for n in tib}
    changed = 0
    for node in tib:
        weight = program.tensors[weight_of(node) or ""]
        assert weight is its.discovered.tensors[weight_of(node) or ""]
        nearest = quantize_weight(weight, Grid(3, symmetric=True), "mse")
        row = program.table(Quantizer)[node.name]
        assert torch.equal(program.tensors[row.weight_scale], nearest.scale)
        steps = (program.tensors[row.codes].int() - nearest.codes()).abs()
        assert int(steps.max()) <= 1  # up or down, never further
        changed += int(steps.sum())
    assert changed
    plain = its.run("measure-disturbance{weights=3 activations=8 strategies=tib}", ctx)
    errors = [sum(sum(r.relative_l2["tib"]) for r in p.table(Disturbance).values()) for p in (plain, program)]
    assert errors[1] < errors[0]
    if name == "unet-sd":
        assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_nearest_is_kept_if_training_does_not_help(subject: Subjects) -> None:
    """One iteration of a tiny step changes no rounding: nearest stays, and the report says so."""
    its = subject("unet2d")
    ctx = its.context()
    program = its.run("reconstruct-tib{bits=8 iterations=1 learning-rate=1e-9}", ctx)
    assert "nearest rounding kept" in ctx.report[-1]
    for node in tib_weighted(its.program):
        nearest = quantize_weight(program.tensors[weight_of(node) or ""], Grid(8, symmetric=True), "mse")
        assert torch.equal(stored_weight(program, program.table(Quantizer)[node.name]), nearest.dequantize())


def test_activations_on_the_way(subject: Subjects) -> None:
    """With FSC before it, the loss is that of the block as it will run."""
    its = subject("unet2d")
    reports = []
    for fsc in ("", "calibrate-finite-set{bits=3},"):
        ctx = its.context()
        program = its.run(f"{fsc}reconstruct-tib{{bits=4 iterations=30}}", ctx)
        reports.append(float(re.findall(r"loss (\S+)", ctx.report[-1])[0]))
        assert all(bool(r.input_bits) == bool(fsc) for r in program.table(Quantizer).values())
    assert reports[1] > reports[0]


def test_same_twice(subject: Subjects) -> None:
    its = subject("in-place")
    a, b = (its.run("reconstruct-tib{bits=2 iterations=50}") for _ in range(2))
    assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


def test_refusals(subject: Subjects) -> None:
    its = subject("unet2d")
    for option, why in [("bits=9", "2 to 8"), ("iterations=0", "at least 1")]:
        with pytest.raises(SpecError, match=why):
            Pipeline.parse(f"reconstruct-tib{{{option}}}")
    with pytest.raises(PipelineError, match=r"needs a schedule"):
        its.run("reconstruct-tib", Context())
    program = its.program
    name = "time_embedding.linear_2.weight"
    program.tensors[name] = program.tensors[name].clone().index_fill_(0, torch.tensor([0]), float("nan"))
    with pytest.raises(CalibrationError, match=r"Weight @time_embedding.linear_2.weight of .* holds NaN"):
        its.run("reconstruct-tib", program=program)
