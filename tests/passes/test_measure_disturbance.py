"""measure-disturbance: known answers on models of which we know them, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import features
from tests.subjects import Subjects, assert_text_round_trip, calibration
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.render import render
from tfqc.ir.rows import Disturbance, Trajectory
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule


@pytest.mark.parametrize("name", ["unet2d-scale-shift", "pixart", "unet2d-labels", "in-place"])
def test_every_feature_step_and_strategy(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = its.run("measure-disturbance{weights=4 activations=4 strategies=tib,cache4,cache8,table,fold}")
    rows = program.table(Disturbance)
    assert set(rows) == {n.name for n in features(program)}
    for row in rows.values():
        assert row.timesteps == its.timesteps
        assert {len(v) for v in row.cosine.values()} == {4}
        for exact in ("fold", "table"):
            assert row.relative_l2[exact] == (0,) * 4 and row.mismatch[exact] == (0,) * 4
        assert sum(row.relative_l2["cache8"]) <= sum(row.relative_l2["cache4"]) + 1e-12
    mean = {s: sum(sum(r.relative_l2[s]) for r in rows.values()) for s in ("tib", "cache4", "cache8")}
    assert 0 < mean["cache8"] < min(mean["cache4"], mean["tib"])
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_nothing_else_changes(subject: Subjects) -> None:
    """Unchanged: the table is all that it adds, whatever its options."""
    its = subject("unet2d")
    program = its.run("measure-disturbance{strategies=fold}")
    del program.tables["disturbance"], program.tables["trajectory"]
    assert render(program) == render(its.program)


def test_more_bits_disturb_less(subject: Subjects) -> None:
    its = subject("unet-sd")

    def error(bits: int) -> float:
        program = its.run(f"measure-disturbance{{weights={bits} activations={bits} strategies=tib}}")
        return sum(sum(r.relative_l2["tib"]) for r in program.table(Disturbance).values())

    assert error(2) > error(4) > error(8) > 0


def test_bytes(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run("measure-disturbance{strategies=tib,cache4,cache8,fold}")
    for name, row in program.table(Disturbance).items():
        values = program.tensor_type(program.node(name)).shape[1]  # type: ignore[union-attr]
        assert isinstance(values, int)
        assert row.bytes["fold"] == 4 * 4 * values
        assert row.bytes["cache8"] == 4 * (values + 8)
        assert row.bytes["cache4"] == 4 * (values // 2 + 8)
        assert row.bytes["tib"] == values * 64 + 12 * values  # int8 codes of Linear(64, values), scales, bias


def test_it_measures_the_quantizers_that_are_there(subject: Subjects) -> None:
    its = subject("unet2d")
    plain = its.run("measure-disturbance{weights=4 activations=4 strategies=tib}")
    tuned = its.run("calibrate-finite-set{bits=4},measure-disturbance{weights=4 activations=4 strategies=tib}")
    total = [sum(sum(r.relative_l2["tib"]) for r in p.table(Disturbance).values()) for p in (plain, tuned)]
    assert total[1] < total[0]


def test_trajectory(subject: Subjects) -> None:
    from diffusers import DDIMScheduler

    for name in ("unet2d-scale-shift", "unet-sd"):
        its = subject(name)
        schedule = SamplingSchedule.of(DDIMScheduler(clip_sample=False), 5)
        ctx = Context(schedule=schedule, calibration=calibration(its))
        deviation = {}
        for bits in (8, 2):
            text = f"measure-disturbance{{weights={bits} activations={bits} strategies=tib trajectory=2}}"
            deviation[bits] = its.run(text, ctx).table(Trajectory)["tib"].cosine
        assert len(deviation[8]) == 6
        assert deviation[8][0] == pytest.approx(1, abs=1e-6)  # both start from the same noise
        assert 1 - deviation[8][-1] < 1 - deviation[2][-1]
        assert deviation[8][-1] > 0.99


def test_refusals(subject: Subjects) -> None:
    its = subject("unet2d")
    with pytest.raises(PipelineError, match=r"needs a schedule"):
        its.run("measure-disturbance", Context())
    with pytest.raises(PipelineError, match=r"needs the table 'tib'"):
        Pipeline.parse("measure-disturbance").check(its.program.stage, (), its.context())
    for option, why in [("weights=1", "2 to 8"), ("activations=9", "2 to 8"), ("strategies=cash8", "no strategy")]:
        with pytest.raises(SpecError, match=why):
            Pipeline.parse(f"measure-disturbance{{{option}}}")
    with pytest.raises(PipelineError, match=r"#1 measure-disturbance needs a calibration"):
        its.run("measure-disturbance{trajectory=1}")
    with pytest.raises(CalibrationError, match=r"depend on 'added_cond_kwargs.*calibration data are needed"):
        subject("unet-sdxl").run("measure-disturbance")


def test_nan_in_a_weight_of_the_block(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.program
    name = "time_embedding.linear_1.weight"
    program.tensors[name] = program.tensors[name].clone().index_fill_(0, torch.tensor([1]), float("nan"))
    with pytest.raises(CalibrationError, match=r"Temporal feature .* is NaN or infinite"):
        its.run("measure-disturbance", program=program)


def test_requests_come_from_the_calibration_data(subject: Subjects) -> None:
    for name in ("unet-sdxl", "sd3", "flux", "dit"):
        its = subject(name)
        program = its.run("measure-disturbance", its.context(calibration=calibration(its)))
        assert all(min(r.cosine["tib"]) > 0.9 for r in program.table(Disturbance).values())
