"""Step policies: read as the schema says or refused, written as they were read, carried out by plan-quantization."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfqc
from tests.cli.factories import tiny
from tests.lowered import context, parts
from tests.subjects import of_example
from tfqc.arguments import read_step_policy
from tfqc.errors import PassError, PipelineError, SpecError
from tfqc.ir.program import Program
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.formats import specs_to_text
from tfqc.quant.plan import planned
from tfqc.quant.step_policy import StepPolicy, parts_of, policy_in, policy_of, read_policy, with_policy

PUBLISHED: dict[str, Any] = {
    "schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration", "scope": ["transformer"],
    "default_mode": "native", "first_steps": {"count": 3, "mode": "a16"}, "last_steps": {"count": 3, "mode": "a16"},
    "overlap": "a16", "reasoner": "a16",
}  # fmt: skip
EDGES = "plan-quantization{first-steps=1 last-steps=1 %s}"


def test_the_published_policy_round_trips() -> None:
    policy = read_policy(PUBLISHED)
    assert policy == StepPolicy(3, 3, "a16", "a16")
    assert policy.to_config() == PUBLISHED == read_policy(json.loads(json.dumps(policy.to_config()))).to_config()
    assert policy_in({"quantization_config": {"runtime": {"diffusion_step_policy": PUBLISHED}}}) == policy
    for none in ({}, None, {"quantization_config": {"quant_method": "tfqc"}}, {"runtime": None}, {"runtime": {}}):
        assert policy_in(none) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version is 2, and 1 is what"),
        ({"schema_version": True}, "schema_version is True"),
        ({"type": "every_n"}, "type is 'every_n'"),
        ({"index_space": "timestep"}, "index_space is 'timestep'"),
        ({"default_mode": "a16"}, "default_mode is 'a16'"),
        ({"scope": ["vae"]}, r"scope is \['vae'\]: a list of transformer"),
        ({"scope": "transformer"}, "scope is 'transformer'"),
        ({"overlap": "fp8"}, "overlap is 'fp8': a16 or native"),
        ({"reasoner": None}, "reasoner is None: a16 or native"),
        ({"first_steps": {"count": -1, "mode": "a16"}}, "first_steps.count is -1: a whole number from 0"),
        ({"first_steps": {"count": True, "mode": "a16"}}, "first_steps.count is True"),
        ({"last_steps": {"count": 3, "mode": "native"}}, "last_steps.mode is 'native'"),
        ({"last_steps": {"count": 3}}, "last_steps does not say 'mode'"),
        ({"last_stps": 1}, "a key 'last_stps', which tfqc does not know. Did you mean 'last_steps'"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_policy({**PUBLISHED, **change})


def test_a_key_that_lacks_is_refused() -> None:
    for key in PUBLISHED:
        with pytest.raises(SpecError, match=f"does not say '{key}'"):
            read_policy({k: v for k, v in PUBLISHED.items() if k != key})
    with pytest.raises(SpecError, match="which is no mapping"):
        read_policy([PUBLISHED])
    with pytest.raises(SpecError, match="of which tfqc knows diffusion_step_policy alone"):
        policy_in({"runtime": {"diffusion_step_policy": PUBLISHED, "other": 1}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"first_steps": 1.5}, "first_steps.count is 1.5"),
        ({"last_steps": True}, "last_steps.count is True"),
        ({"overlap": "float"}, "overlap is 'float'"),
        ({"reasoner": "A16"}, "reasoner is 'A16'"),
        ({"scope": "unet"}, "scope is 'unet'"),
        ({"scope": ()}, r"scope is \[\]"),
    ],
)
def test_one_made_in_python_is_checked_as_well(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        read_step_policy(StepPolicy(**given))


def test_one_in_another_place_is_no_policy_of_nobody() -> None:
    for place in ({"quantization_config": {"diffusion_step_policy": PUBLISHED}}, {"diffusion_step_policy": PUBLISHED}):
        with pytest.raises(SpecError, match=r"in the wrong place: it is read under quantization_config\.runtime"):
            policy_in(place)


def test_which_steps_are_protected() -> None:
    assert [i for i, mark in enumerate(read_policy(PUBLISHED).protects(50)) if mark] == [0, 1, 2, 47, 48, 49]
    assert StepPolicy(3, 3).protects(4) == [True] * 4
    assert StepPolicy(3, 3, overlap="native").protects(4) == [True, False, False, True]
    assert StepPolicy(3, 3).protects(1) == [False]
    assert parts_of(StepPolicy(1, 2).protects(5)) == [(0, 1, True), (1, 3, False), (3, 5, True)]


def test_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"quantization_config": {"runtime": {"diffusion_step_policy": PUBLISHED}}}))
    assert read_step_policy(tmp_path) == read_step_policy(file) == read_policy(PUBLISHED)
    file.write_text("{}")
    with pytest.raises(SpecError, match=r"config.json has no quantization_config.runtime.diffusion_step_policy"):
        read_step_policy(tmp_path)
    with pytest.raises(SpecError, match="step_policy=3 is no policy"):
        read_step_policy(3)


def test_a_pipeline_carries_it() -> None:
    passes = Pipeline.parse("normalize,discover-tib,plan-quantization{scope=tib},plan-quantization{weights=4}")
    made = with_policy(passes, StepPolicy(2, 1))
    assert str(made).count("first-steps=2 last-steps=1") == 2
    assert policy_of(Pipeline.parse(str(made))) == StepPolicy(2, 1)
    assert policy_of(passes) is None and with_policy(passes, StepPolicy()) == passes
    assert with_policy(made, StepPolicy()) == passes  # none is a policy, too
    plain = Pipeline.parse("normalize")
    assert with_policy(plain, StepPolicy()) == plain
    with pytest.raises(PipelineError, match="No pass of the pipeline protects steps: put plan-quantization"):
        with_policy(Pipeline.parse("normalize"), StepPolicy(1))
    with pytest.raises(SpecError, match="first-steps=-1 is negative"):
        Pipeline.parse("plan-quantization{first-steps=-1}")


def inputs(program: Program) -> dict[str, str]:
    """The plan of each layer's input, by its module."""
    nodes = [n for n in program.nodes() if planned(program, n, "input")]
    return {program.origins[n.name].module: specs_to_text(planned(program, n, "input")) for n in nodes}


class Guided(nn.Module):
    """A layer that runs at each step, and one that runs once an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.to_k = nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return self.conv_in(sample) * timestep[:, None, None, None] + self.to_k(encoder_hidden_states)[:, :, None, None]


def test_a_plan_of_protected_steps() -> None:
    """Each step of a layer is in floating point or on the grid; what runs once an image is for `reasoner`."""
    inputs_ = {
        "sample": torch.randn(2, 2, 4, 4),
        "timestep": torch.tensor([9, 9]),
        "encoder_hidden_states": torch.ones(2, 2),
    }
    its = of_example("guided", lambda: (Guided().requires_grad_(False), inputs_))
    program = its.run(EDGES % "mode=per-step", its.context())
    assert inputs(program)["conv_in"] == (
        "float{steps=0,1 by=plan-quantization why=first-steps=1},"
        "int8{per=step symmetric=false steps=1,3 by=plan-quantization},"
        "float{steps=3,4 by=plan-quantization why=last-steps=1}"
    )
    assert inputs(program)["to_k"].startswith("int8{symmetric=false by=")
    program = its.run(EDGES % "reasoner=a16", its.context())
    assert inputs(program)["to_k"] == "float{by=plan-quantization why=reasoner=a16}"
    with pytest.raises(PipelineError, match="plan-quantization needs a schedule"):
        its.run(EDGES % "", Context())


@pytest.mark.parametrize("mode", ["static", "per-step"])
def test_protected_steps_are_computed_in_floating_point(mode: str, tmp_path: Path) -> None:
    """Bit for bit as if activations were not quantized; the others as if no step were protected, where rows are theirs.

    A time that is in no schedule does as the nearest.
    """
    text = (
        f"normalize,discover-tib,plan-quantization{{weights=none activations=%s mode={mode}}},select-maintenance%s,"
        "fold-cache%s"
    )
    policy = {**PUBLISHED, "first_steps": {"count": 1, "mode": "a16"}, "last_steps": {"count": 1, "mode": "a16"}}
    quantized, plain = text % (8, ",calibrate-activations", ",insert-qdq"), text % ("none", "", "")
    given = {"steps": 4, "calibration": 2}
    made = tfqc.compile(tiny(), pipeline=quantized, step_policy=policy, **given)
    assert made.facts["step_policy"] == {**policy}
    assert "protected steps: 2 inputs stay in floating point at 2 of 4 steps" in str(made.facts["report"])
    others = [tfqc.compile(tiny(), pipeline=other, **given) for other in (quantized, plain)]
    ours, native, a16 = (
        tfqc.load(artifact.save(tmp_path / str(number))) for number, artifact in enumerate((made, *others))
    )
    x = tiny().example_inputs["sample"]  # type: ignore[call-overload]
    for times, protected in (([750, 750], [1, 1]), ([500, 500], [0, 0]), ([250, 0], [0, 1]), ([740, 260], [1, 0])):
        found, kept, rounded = (model(x, torch.tensor(times)) for model in (ours, a16, native))
        for image, mark in enumerate(protected):
            assert torch.equal(found[image], kept[image]) == bool(mark)
            assert mode == "static" or torch.equal(found[image], rounded[image]) != bool(mark)


def test_one_range_is_that_of_the_steps_that_need_it(tmp_path: Path) -> None:
    """Values of protected steps do not widen it."""
    its = parts()
    scales = []
    for policy in ("", "first-steps=3 "):
        text = f"plan-quantization{{{policy}weights=none}},select-maintenance,calibrate-activations"
        program = its.run(text, context(its, tmp_path))
        scales.append({name: t for name, t in program.tensors.items() if name.endswith(".scale")})
    assert scales[0].keys() == scales[1].keys() and all(t.shape == (1,) for t in scales[1].values())
    assert any(bool(scales[1][name] < scales[0][name]) for name in scales[0])


def test_what_no_pass_can_do(tmp_path: Path) -> None:
    its = parts()
    for line in (
        "conv_in input -> int8{symmetric=false steps=0,2},int4{symmetric=false steps=2,4}",
        "conv_in weight -> float{steps=0,2},int8{per=channel steps=2,4}",
    ):
        ctx = context(its, tmp_path)
        ctx.plan = line
        with pytest.raises(PassError, match="no pass quantizes an operand otherwise at other steps"):
            its.run("plan-quantization,select-maintenance,calibrate-weights,calibrate-activations", ctx)


def test_a_target_without_such_kernels_says_so() -> None:
    made = tfqc.compile(tiny(), "cpu-int8", steps=3, calibration=2, step_policy=StepPolicy(1))
    assert "its input stays in floating point at some steps (planned as float{steps=0,1}" in str(made.facts["report"])
    assert "leave first-steps out" in str(made.facts["report"])
