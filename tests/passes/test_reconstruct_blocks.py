"""reconstruct-blocks: a network nearer to the full-precision one, from what other passes have found, or as it was."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from tests.helpers import first
from tests.subjects import Subject, Subjects, assert_text_round_trip, calibration
from tfqc.calibration.batches import batches
from tfqc.calibration.trajectories import nested
from tfqc.errors import PassError, PipelineError, SpecError
from tfqc.ir.program import Program
from tfqc.ir.rows import Quantizer, Tib
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.parameters import quantizer_of
from tfqc.sampling.schedule import SamplingSchedule

BEFORE = (
    "select-maintenance{strategy=fold},plan-quantization{weights=4 activations=4 mode=per-step},calibrate-weights,"
    "calibrate-activations"
)
FEW = "reconstruct-blocks{iterations=60 images=24 learning-rate=0.02}"


def context(its: Subject, tmp_path: Path | None = None) -> Context:
    return Context(SamplingSchedule.of(DDIMScheduler(), 3), calibration(its, images=4, batch_size=2), workdir=tmp_path)


def error(its: Subject, program: Program, ctx: Context) -> float:
    """On all images of the trajectories at all steps."""
    lowered = Pipeline.parse("fold-cache,insert-qdq").run(program.clone(), ctx)
    calls = [nested({i.path: b.inputs[i.name] for i in program.inputs}) for b in batches(its.program, ctx, 10**6)]
    with torch.no_grad():
        return sum(float(F.mse_loss(first(lowered(**call)), its.reference(call))) for call in calls)


def parameters(program: Program) -> dict[str, Tensor]:
    """What quantizers name, by node and part."""
    return {f"{n}.{t}": program.tensors[t] for n, row in program.table(Quantizer).items() for t in row.tensors()}


@pytest.mark.parametrize("name", ["unet-sd", "dit-labels", "unet-sdxl"])
def test_less_error_than_before(name: str, subject: Subjects, tmp_path: Path) -> None:
    its = subject(name)
    ctx = context(its, tmp_path)
    plain = its.run(BEFORE, ctx)
    program = its.run(FEW, ctx, plain.clone())
    (line,) = [r for r in ctx.report if r.startswith("BRECQ")]
    better, count, before, after = re.findall(r"BRECQ: (\d+) of (\d+) .* block (\S+) before, (\S+) after", line)[0]
    assert 0 < int(better) <= int(count) and float(after) < 0.9 * float(before)
    assert error(its, program, ctx) < 0.9 * error(its, plain, ctx)
    tib = program.table(Tib)
    changed = 0
    for node, row in program.table(Quantizer).items():
        old = plain.table(Quantizer)[node]
        assert (row.weight_bits, row.input_bits) == (old.weight_bits, old.input_bits)
        assert torch.equal(program.tensors[row.weight_scale], plain.tensors[old.weight_scale])
        steps = (program.tensors[row.codes].int() - plain.tensors[old.codes].int()).abs()
        assert int(steps.max()) <= (0 if node in tib else 1)  # to the other side of the weight, never further
        changed += int(steps.sum())
    assert changed
    assert_text_round_trip(program, its.call(list(ctx.need_schedule().timesteps[:2])))


def test_scales_have_a_row_for_each_step(subject: Subjects) -> None:
    its = subject("unet-sd")
    ctx = context(its)
    plain = its.run(BEFORE, ctx)
    program = its.run(FEW, ctx, plain.clone())
    learned = 0
    for node, row in program.table(Quantizer).items():
        scale, old = program.tensors[row.input_scale], plain.tensors[plain.table(Quantizer)[node].input_scale]
        assert scale.shape == old.shape and bool((scale > 0).all())
        learned += len(scale) > 1 and len((scale / old).unique()) > 1
        for other in program.step.nodes:  # of one value there is one code, wherever it is read
            same = other.all_input_nodes[:1] == program.node(node).all_input_nodes[:1]
            if same and (its_row := quantizer_of(program, other)).input_scale:
                assert its_row.input_scale == row.input_scale
    assert learned


def test_what_was_found_is_found_again(subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained twice in a working directory; with other options it is."""
    its = subject("unet-sd")
    ctx = context(its, tmp_path)
    plain = its.run(BEFORE, ctx)
    made = parameters(its.run(FEW, ctx, plain.clone()))
    elsewhere = parameters(its.run(FEW, context(its), plain.clone()))
    assert made.keys() == elsewhere.keys() and all(torch.equal(made[k], elsewhere[k]) for k in made)

    def trained(*_: object, **__: object) -> float:
        raise AssertionError("trained again")

    monkeypatch.setattr("tfqc.calibration.block_training.reconstruct", trained)
    again = parameters(its.run(FEW, ctx, plain.clone()))
    assert made.keys() == again.keys() and all(torch.equal(made[k], again[k]) for k in made)
    with pytest.raises(PassError, match="trained again"):
        its.run(FEW.replace("60", "61"), ctx, plain.clone())


@pytest.mark.parametrize("text", [f"{BEFORE},{FEW}", "reconstruct-tib{iterations=30},select-maintenance{strategy=tib}"])
def test_under_inference_mode(text: str, subject: Subjects) -> None:
    its = subject("unet-sd")
    made = parameters(its.run(text, context(its)))
    with torch.inference_mode():
        again = parameters(its.run(text, context(its)))
    assert made.keys() == again.keys() and all(torch.equal(made[k], again[k]) for k in made)


def test_what_does_not_help_is_left(subject: Subjects) -> None:
    its = subject("unet-sd")
    ctx = context(its)
    plain = its.run(BEFORE, ctx)
    program = its.run(
        "reconstruct-blocks{iterations=1 images=8 learning-rate=1e-9 steps-rate=1e-12}", ctx, plain.clone()
    )
    before, after = parameters(plain), parameters(program)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert re.match(r"BRECQ: 0 of \d+ blocks better", ctx.report[-1])


@pytest.mark.parametrize(
    "options",
    [
        "weights=4 activations=none", "weights=none activations=4 mode=static",
        "weights=4 activations=4 mode=per-token", "weights=3 activations=4 group=8 symmetric=false",
        "weights=4 activations=4 mode=per-step first-steps=1",
    ],
)  # fmt: skip
def test_other_quantizers(options: str, subject: Subjects) -> None:
    its = subject("dit-labels")
    ctx = context(its)
    text = f"select-maintenance{{strategy=fold}},plan-quantization{{{options}}}"
    text += ",calibrate-weights" * ("weights=none" not in options)
    text += ",calibrate-activations" * ("activations=none" not in options)
    plain = its.run(text, ctx)
    program = its.run(FEW, ctx, plain.clone())
    assert error(its, program, ctx) < error(its, plain, ctx)


def test_nothing_to_learn(subject: Subjects) -> None:
    its = subject("unet-sd")
    ctx = context(its)
    text = "select-maintenance{strategy=fold},plan-quantization{weights=none activations=none},calibrate-activations"
    plain = its.run(text, ctx)
    assert parameters(its.run(FEW, ctx, plain.clone())) == parameters(plain) == {}


def test_refused(subject: Subjects) -> None:
    its = subject("unet-sd")
    with pytest.raises(PipelineError, match="reconstruct-blocks needs"):
        its.run("select-maintenance,reconstruct-blocks", context(its))
    with pytest.raises(PipelineError, match="reconstruct-blocks"):
        its.run(f"{BEFORE},fold-cache,reconstruct-blocks", context(its))
    for option, said in (
        ("iterations=0", "iterations=0: at least 1"), ("images=0", "images=0: at least 1"),
        ("steps-rate=0", "steps-rate=0.0: a positive number"), ("learning-rate=inf", "a positive number"),
    ):  # fmt: skip
        with pytest.raises(SpecError, match=said):
            Pipeline.parse(f"reconstruct-blocks{{{option}}}")


def test_a_block_that_is_left_computes_as_it_did(subject: Subjects, tmp_path: Path) -> None:
    """Scales that training has moved in vain are not those that later blocks are trained behind."""
    its = subject("unet-sd")
    plain = its.run(BEFORE, context(its))
    far = FEW.replace("}", " steps-rate=5}")
    first_time, second_time = context(its, tmp_path), context(its, tmp_path)
    made = parameters(its.run(far, first_time, plain.clone()))
    better, count, before, after = re.findall(
        r"(\d+) of (\d+) .* block (\S+) before, (\S+) after", first_time.report[-1]
    )[0]
    assert int(better) < int(count) and float(after) <= float(before)
    again = parameters(its.run(far, second_time, plain.clone()))
    assert first_time.report[-1] == second_time.report[-1]
    assert made.keys() == again.keys() and all(torch.equal(made[k], again[k]) for k in made)


def test_nothing_is_found_for_other_bits(subject: Subjects, tmp_path: Path) -> None:
    """Ranges of each token are no tensors: bits of inputs alone tell two runs apart."""
    its = subject("dit-labels")
    made: list[list[dict[str, Tensor]]] = []
    for bits in (4, 8):
        options = f"activations={bits} mode=per-token skip=pos_embed.*"
        plain = its.run(BEFORE.replace("activations=4 mode=per-step", options), context(its))
        assert not any(row.input_scale for row in plain.table(Quantizer).values())
        made.append([parameters(its.run(FEW, context(its, at), plain.clone())) for at in (tmp_path, None)])
    for kept, fresh in made:
        assert kept.keys() == fresh.keys() and all(torch.equal(kept[k], fresh[k]) for k in kept)
