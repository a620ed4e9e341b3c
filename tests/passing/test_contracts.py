"""What `check` says of a pipeline is what `run` does: every recipe with every strategy, every option at its ends."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from tests.tiny import tiny
from tfqc.codegen.recipes import STRATEGIES
from tfqc.codegen.target import Target
from tfqc.errors import CalibrationError, PassError, PipelineError, SpecError
from tfqc.instruments import VerifyEach
from tfqc.ir.program import Program
from tfqc.passing import Context
from tfqc.passing.known import pass_names
from tfqc.passing.order import tables_of
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule

SAMPLED = SamplingSchedule.of(DDIMScheduler(clip_sample=False), 3)
BARE = SamplingSchedule((421.0, 7.0))
IMAGES = Calibration(torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0)), {})
CONTEXTS: dict[str, dict[str, Any]] = {
    "all": {"schedule": SAMPLED, "calibration": IMAGES},
    "no calibration": {"schedule": SAMPLED},
    "bare timesteps": {"schedule": BARE, "calibration": IMAGES},
    "nothing": {},
    "no weights": {"schedule": SAMPLED, "calibration": IMAGES},
}
SENTENCE = re.compile(r"#\d+ [a-z0-9-]+ (needs|samples|works) .*(put|give|let|capture|start) .*\.$")


def program_for(context: str) -> Program:
    program = tiny()
    if context == "no weights":
        program.tensors = {name: tensor.to("meta") for name, tensor in program.tensors.items()}
    return program


def agrees(pipeline: Pipeline, context: str, program: Program | None = None) -> bool:
    """What check says; run has to do the same."""
    program = program_for(context) if program is None else program
    with tempfile.TemporaryDirectory() as workdir:
        ctx = Context(**CONTEXTS[context], workdir=Path(workdir))
        try:
            pipeline.check(program.stage, tables_of(program), ctx, program.has_weights)
        except PipelineError as error:
            assert SENTENCE.match(str(error)), error
            with pytest.raises(PipelineError, match=re.escape(str(error))):
                pipeline.run(program, ctx, [])
            return False
        pipeline.run(program, ctx, [VerifyEach()])
        return True


TARGETS = (
    "fake-quant{weights=4 activations=8}", "fake-quant{weights=none activations=none}", "fake-quant{activations=none}",
    "fake-quant{mode=per-token group=8}", "cpu-int8", "cpu-int8{weights=4 activations=static}",
    "cuda-int4{mode=w4a8 rank=16 group=128}", "cuda-int4{mode=w4a16}", "cuda-int4{activations=per-token edges=none}",
)  # fmt: skip


def recipe(target: str, strategy: str) -> Pipeline:
    """The whole of a target's pipeline, with little training."""
    parsed = Target.parse(target)
    text = parsed.backend.pipeline(parsed.options, strategy).replace("reconstruct-tib", "reconstruct-tib{iterations=2}")
    return Pipeline.parse(text) + Pipeline(parsed.backend.legalize(parsed.options))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target", TARGETS)
def test_recipes(target: str, strategy: str) -> None:
    pipeline = recipe(target, strategy)
    said = {context: agrees(pipeline, context) for context in CONTEXTS}
    assert said["all"] and not said["nothing"] and not said["no weights"]
    samples = any("sampler" in item.contract().data for item in pipeline.passes)
    assert said["no calibration"] == said["bare timesteps"] == (not samples)


# What a pass stands behind, and its options at their ends.
BEFORE = {
    "normalize": "", "discover-tib": "normalize", "measure-disturbance": "normalize,discover-tib",
    "select-maintenance": "normalize,discover-tib", "split-low-rank": "normalize,discover-tib",
    "split-concat": "normalize,discover-tib",
    "plan-quantization": "normalize,discover-tib",
    "calibrate-finite-set": "normalize,discover-tib", "reconstruct-tib": "normalize,discover-tib",
    "reconstruct-weights": "normalize,discover-tib",
    "learn-time-scales": "normalize,discover-tib",
    "calibrate-weights": "normalize,discover-tib,select-maintenance{strategy=tib}",
    "calibrate-activations": "normalize,discover-tib,select-maintenance{strategy=tib}",
    "reconstruct-blocks": (
        "normalize,discover-tib,select-maintenance,calibrate-weights,calibrate-activations{mode=per-step}"
    ),
    "fold-cache": "normalize,discover-tib,select-maintenance",
    "hoist-request": "normalize,discover-tib,select-maintenance,fold-cache",
}  # fmt: skip
LOWERED = (
    "normalize,discover-tib,select-maintenance,calibrate-weights,calibrate-activations{mode=per-step},fold-cache,"
    "insert-qdq"
)
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "measure-disturbance": {
        "weights": ("2", "8"), "activations": ("2", "8"), "strategies": ("tib", "cache4,table"),
        "trajectory": ("0", "1", "99"),
    },
    "select-maintenance": {
        "strategy": ("auto", "tib", "cache4", "cache8", "table", "fold"), "candidates": ("cache4", "tib,fold"),
        "granularity": ("feature-step", "feature", "step", "model"), "metric": ("cosine", "relative-l2"),
        "budget": ("100000",),
    },
    "split-low-rank": {"rank": ("16", "128")},
    "plan-quantization": {
        "weights": ("2", "8", "none"), "activations": ("2", "8", "none"), "method": ("mse",), "edges": ("2", "8"),
        "mode": ("static", "per-step", "per-token"), "activation-method": ("mse",), "symmetric": ("false",),
        "group": ("1", "9999"), "group-scope": ("linear",), "intervals": ("1", "99"),
        "scope": ("all", "tib", "linear"), "skip": ("conv_in", "*"),
    },
    "calibrate-weights": {
        "bits": ("2", "8"), "method": ("mse",), "group": ("1", "9999"), "symmetric": ("false",),
        "edge-bits": ("2", "8"), "scope": ("all", "tib", "linear"), "skip": ("conv_in", "*"),
    },
    "calibrate-activations": {
        "bits": ("2", "8"), "mode": ("static", "per-step", "per-token"), "method": ("mse",), "intervals": ("1", "99"),
        "edge-bits": ("2", "8"), "scope": ("all", "tib"), "skip": ("conv_in", "*"),
    },
    "calibrate-finite-set": {"bits": ("2", "8"), "scope": ("tib", "all"), "intervals": ("1", "99")},
    "reconstruct-tib": {
        "bits": ("2", "8"), "method": ("min-max",), "learning-rate": ("1e-9", "1e9"),
    },
    "reconstruct-weights": {
        "bits": ("2", "8"), "method": ("min-max",), "group": ("1", "9999"), "edge-bits": ("2", "8"),
        "scope": ("all", "linear"), "steps": ("1", "9999"), "skip": ("conv_in", "*"),
    },
    "reconstruct-blocks": {
        "images": ("1", "99"), "learning-rate": ("1e-9", "1"), "steps-rate": ("1e-9", "1"), "optimizer": ("stquant",),
    },
    "learn-time-scales": {
        "bits": ("3", "8"), "grid": ("full", "released"), "steps": ("1", "9999"), "learning-rate": ("1e-9", "1e9"),
        "edge-bits": ("3", "8"), "scope": ("all", "tib"), "skip": ("conv_in", "*"),
    },
    "fold-cache": {
        "mode": ("exact", "bias", "affine", "table"), "policy": ("recompute", "nearest", "error"),
    },
    "lower-attention": {"mode": ("fp32", "bf16", "int8")},
    "fuse-epilogues": {"gates": ("true", "false")},
    "fuse-quantize": {"rows": ("true", "false")},
    "prepack-weights": {"bits": ("4", "8")},
}  # fmt: skip


TRAINING = ("reconstruct-tib", "learn-time-scales", "reconstruct-blocks")


def cases() -> Iterator[str]:
    for name in pass_names():
        few = "iterations=2 " if name in TRAINING else ""
        yield f"{name}{{{few}}}"
        for option, values in OPTIONS.get(name, {}).items():
            yield from (f"{name}{{{few}{option}={value}}}" for value in values)


@pytest.mark.parametrize("text", cases())
def test_options(text: str) -> None:
    name = text.partition("{")[0]
    lowered = LOWERED.removesuffix(",insert-qdq") if name == "insert-qdq" else LOWERED
    pipeline = Pipeline.parse(",".join(filter(None, (BEFORE.get(name, lowered), text))))
    said = {context: agrees(pipeline, context) for context in CONTEXTS}
    assert said["all"] or "strategy=auto" in text


@pytest.mark.parametrize("granularity", ["feature-step", "feature", "step", "model"])
@pytest.mark.parametrize("measured", ["", "tib,fold", "cache8,tib,fold"])
def test_what_auto_chooses_from(measured: str, granularity: str) -> None:
    measure = f"measure-disturbance{{strategies={measured}}}," if measured else ""
    text = f"{measure}select-maintenance{{strategy=auto candidates=cache8,fold granularity={granularity}}},fold-cache"
    assert agrees(Pipeline.parse(f"normalize,discover-tib,{text}"), "all") == ("cache8" in measured)
    # The same where an earlier run has measured.
    program = Pipeline.parse(f"normalize,discover-tib,{measure}").run(tiny(), Context(**CONTEXTS["all"]))
    later = Pipeline.parse(text.removeprefix(measure))
    ctx = Context(**CONTEXTS["all"])
    if "cache8" in measured:
        later.run(program, ctx)
        return
    with pytest.raises(PipelineError, match=r"#1 select-maintenance needs .*disturbance"):
        later.run(program, ctx)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("plan-quantization{weights=9}", "weights=9 is out of range"),
        ("plan-quantization{edges=1}", "edges=1 is out of range"),
        ("plan-quantization{group=0}", "group=0: at least one column"),
        ("plan-quantization{intervals=-1}", "negative"),
        ("plan-quantization{activation-method=fsc}", "say mode=per-step"),
        ("plan-quantization{activation-method=tdq}", "say mode=per-step"),
        ("calibrate-weights{edge-bits=0}", "bits=0 is out of range"),
        ("calibrate-weights{group=0}", "group=0: at least one column"),
        ("calibrate-activations{edge-bits=0}", "bits=0 is out of range"),
        ("calibrate-activations{intervals=-1}", "negative"),
        ("calibrate-finite-set{intervals=-1}", "negative"),
        ("reconstruct-weights{edge-bits=0}", "bits=0 is out of range"),
        ("reconstruct-weights{group=-1}", "at least one column"),
        ("reconstruct-tib{learning-rate=0}", "a positive number"),
        ("reconstruct-tib{learning-rate=nan}", "number"),
        ("reconstruct-tib{learning-rate=inf}", "a positive number"),
        ("measure-disturbance{strategies=}", "at least one"),
        ("measure-disturbance{trajectory=-1}", "negative"),
        ("select-maintenance{candidates=}", "at least one"),
        ("select-maintenance{budget=-1}", "negative"),
        ("prepack-weights{bits=5}", "4 or 8 bits"),
    ],
)
def test_values_that_no_run_could_use(text: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        Pipeline.parse(text)


def test_data_that_do_not_fit_the_model_are_refused_before_anything_runs() -> None:
    pipeline = Pipeline.parse("normalize,discover-tib,select-maintenance,calibrate-activations")
    for shape, why in (((2, 3, 4, 4), "latents is 2x3x4x4, and the model takes Bx2x4x4"), ((2, 2, 4), "is 2x2x4, and")):
        program = tiny()
        ctx = Context(schedule=SAMPLED, calibration=Calibration(torch.zeros(shape), {}))
        with pytest.raises(CalibrationError, match=why):
            pipeline.run(program, ctx)
        assert program.stage == tiny().stage


# -- the rehearsal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "select"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_rehearsal_has_the_operations_of_a_run(target: str, strategy: str, tmp_path: Path) -> None:
    pipeline = recipe(target, strategy)
    program, ctx = tiny(), Context(schedule=SAMPLED, calibration=IMAGES, workdir=tmp_path)
    rehearsed = pipeline.rehearse(program, ctx)
    assert not list(tmp_path.iterdir()) and not ctx.report and program.has_weights
    ran = pipeline.run(program, ctx)

    def operations(program: Program) -> list[tuple[str, str, str]]:
        graphs = program.functions.values()
        nodes = [n for g in graphs for n in g.nodes if n.op == "call_function"]
        return [(n.name, str(n.target), str(program.types.get(n.name))) for n in nodes]

    assert operations(rehearsed) == operations(ran)


def test_what_a_rehearsal_finds() -> None:
    text = "normalize,discover-tib,select-maintenance,calibrate-activations,calibrate-weights{skip=conv_inn}"
    with pytest.raises(
        PassError, match=r"skip=conv_inn: no linear or convolution of Tiny lies there. Near it: conv_in"
    ):
        Pipeline.parse(text).rehearse(tiny(), Context(**CONTEXTS["all"]))


@pytest.mark.parametrize("what", ["schedule", "calibration"])
def test_a_list_is_told_what_a_context_takes(what: str) -> None:
    with pytest.raises(PassError, match=rf"{what} is a list: give a context"):
        Context(**{what: [1.0]})  # pyright: ignore[reportArgumentType]
