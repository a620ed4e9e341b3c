"""calibrate-finite-set: T rows for every activation of the block, and less error than one row for all steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.passes.test_calibrate_activations import context
from tests.subjects import Subjects, assert_text_round_trip, calibration
from tfqc.analysis.weighted import tib_weighted
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.render import render
from tfqc.ir.rows import Disturbance, Quantizer, RowSource
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline


@pytest.mark.parametrize("name", ["unet2d-scale-shift", "unet-sd", "pixart", "chain", "dit-labels", "in-place"])
def test_a_row_for_each_timestep(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.run("calibrate-finite-set{bits=4}", its.context(calibration=calibration(its)), numerics=True)
    rows = program.table(Quantizer)
    assert set(rows) == {n.name for n in tib_weighted(its.program)}
    for row in rows.values():
        assert row.input_bits == 4 and not row.codes
        for tensor in (row.input_scale, row.input_zero_point):
            assert program.tensors[tensor].shape == (4,)
            assert program.table(RowSource)[tensor].kind == "activation"
    assert any(len(program.tensors[r.input_scale].unique()) == 4 for r in rows.values())
    assert_text_round_trip(program, its.call(list(its.timesteps[:2])))


@pytest.mark.parametrize("name", ["unet-sd", "unet2d-scale-shift", "pixart", "dit-labels"])
def test_less_error_than_static(name: str, subject: Subjects) -> None:
    its = subject(name)
    errors = []
    for fsc in ("", "calibrate-finite-set{bits=4},"):
        program = its.run(f"{fsc}measure-disturbance{{weights=8 activations=4 strategies=tib}}")
        errors.append(sum(sum(r.relative_l2["tib"]) for r in program.table(Disturbance).values()))
    assert errors[1] < errors[0]


def test_ranges_are_exact_for_the_finite_set(subject: Subjects) -> None:
    """Nothing is clipped: each step's least and largest value lie on the grid's ends."""
    from tfqc.temporal.features import tib_run

    its = subject("unet2d")
    program = its.run("calibrate-finite-set{bits=8}")
    seen: dict[str, torch.Tensor] = {}
    tib_run(its.program, its.context())(observe=lambda name, value: seen.update({name: value.flatten(1)}))
    for name, row in program.table(Quantizer).items():
        scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
        codes = (seen[name] / scale[:, None]).round() + zero_point[:, None]
        assert int(codes.min()) >= -1 and int(codes.max()) <= 256
        low = seen[name].amin(1).clamp(max=0)
        assert torch.allclose((0 - zero_point) * scale, low, atol=float(scale.max()))


def test_scope_all(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    program = its.run("calibrate-finite-set{scope=all intervals=2}", context(its, tmp_path))
    rows = program.table(Quantizer)
    tib = {n.name for n in tib_weighted(its.program)}
    lengths = {n: program.tensors[r.input_scale].numel() for n, r in rows.items()}
    assert {lengths[n] for n in tib} == {4}
    text = {n for n in rows if "attn2.to_k" in program.origins[n].module or "attn2.to_v" in program.origins[n].module}
    assert {lengths[n] for n in text} == {1}
    others = [r for n, r in rows.items() if n not in tib | text]
    assert all(len(program.tensors[r.input_scale].unique()) <= 2 for r in others)
    first = render(program)
    assert render(its.run("calibrate-finite-set{scope=all intervals=2}", context(its, tmp_path), program)) == first


def test_refusals(subject: Subjects) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs a schedule"):
        its.run("calibrate-finite-set", Context())
    with pytest.raises(SpecError, match=r"2 to 8 bits"):
        Pipeline.parse("calibrate-finite-set{bits=16}")
    with pytest.raises(CalibrationError, match=r"calibration data are needed"):
        subject("sd3").run("calibrate-finite-set")
    program = its.program
    name = "time_embedding.linear_1.bias"
    program.tensors[name] = program.tensors[name].clone().fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"The input of %\w+ \(.*is NaN or infinite"):
        its.run("calibrate-finite-set", program=program)
