"""A plan as text: it says the table back, and a line that is wrong is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.quant.test_formats import operands
from tests.subjects import Subjects
from tfqc.analysis.weighted import weighted_nodes
from tfqc.errors import SpecError
from tfqc.ir.program import Program
from tfqc.ir.rows import QuantPlan
from tfqc.quant.formats import Specs, specs_to_text
from tfqc.quant.plan_text import bind_plan, plan_to_text, read_plan


def possible(specs: Specs, operand: str) -> Specs:
    """The same without what no layer of the model has: parts of its channels and steps, tokens of weights."""
    (spec, *_) = specs
    spec = replace(spec, channels=None, steps=None)
    if spec.format.kind != "none" and (spec.per == "token" or (spec.per == "step" and operand == "weight")):
        spec = replace(spec, per="channel", intervals=0, range="mse")
    return (spec,)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_read_back(data: st.DataObject, subject: Subjects) -> None:
    program = subject("unet2d").program
    rows: dict[str, QuantPlan] = {}
    for node in weighted_nodes(program):
        names = data.draw(st.sets(st.sampled_from(["weight", "input"]), min_size=1))
        rows[node.name] = QuantPlan({n: specs_to_text(possible(data.draw(operands()), n)) for n in sorted(names)})
    program.set_table(QuantPlan, rows)
    text = plan_to_text(program)
    assert bind_plan(program, text, steps=4) == rows
    planned = program.clone()
    planned.set_table(QuantPlan, bind_plan(program, text, steps=4))
    assert plan_to_text(planned) == text


def test_it_is_a_page_to_read(subject: Subjects) -> None:
    program = subject("unet2d").run("plan-quantization{weights=4 edges=8 mode=per-step skip=mid_block}")
    head, by, *lines = plan_to_text(program).splitlines()
    assert head.startswith("# What is quantized of UNet2DModel")
    assert by == "by plan-quantization"
    assert len(lines) == len(list(weighted_nodes(program)))
    said = dict(line.split(maxsplit=1) for line in lines)
    assert list(said) == [program.origins[n.name].module for n in weighted_nodes(program)]
    assert said["conv_in"].split("   ")[0] == "weight -> int8{per=channel why=edges=8}"
    assert "weight -> float{why=skip}" in said["mid_block.resnets.0.conv1"]
    starts = {line.index("input -> ") for line in lines}
    assert len(starts) == 1


def shared(program: Program) -> tuple[str, str]:
    """Make two layers those of one module, and say which."""
    first, second = list(weighted_nodes(program))[:2]
    program.origins[second.name] = program.origins[first.name]
    return first.name, second.name


def test_a_module_that_runs_twice(subject: Subjects) -> None:
    program = subject("unet2d").program
    first, second = shared(program)
    module = program.origins[first].module
    both = bind_plan(program, f"{module} weight -> int4", None)
    assert both == {name: QuantPlan({"weight": "int4"}) for name in (first, second)}
    program.set_table(QuantPlan, {**both, second: QuantPlan({"weight": "int8"})})
    text = plan_to_text(program)
    assert f"%{first}" in text and module in text.split("#")[-1]
    assert bind_plan(program, text, None) == program.table(QuantPlan)
    with pytest.raises(SpecError, match=r"Line 2 of the plan: another line is for %\w+"):
        bind_plan(program, f"{module} weight -> int4\n%{first} weight -> int8", None)


def test_comments_and_authors() -> None:
    text = "# by nobody\n\n  by Ann # who measured it\nconv_in weight -> int8{by=Bob},\n"
    with pytest.raises(SpecError, match="Line 4 of the plan: Expected a format"):
        read_plan(text)
    (line,) = read_plan(text.replace(",", " input->int4 # so"))
    assert (line.number, line.key) == (4, "conv_in")
    assert [line.operands[o][0].by for o in ("weight", "input")] == ["Bob", "Ann"]


BAD: dict[str, str] = {
    "conv_in": r"Expected an operand and its format",
    "conv_in weight int8": r"Expected '->' after 'weight' at column 16",
    "conv_in weight -> int9": r"no format 'int9'\. Did you mean 'int8'",
    "conv_in weight -> int8{pr=channel}": r"no option 'pr'\. Did you mean 'per'",
    "conv_in weight -> int8{per=group}": r"group=0 with per=group",
    "conv_in weight -> int8 weight -> int4": r"each operand once, not 'weight' again",
    "conv_in weight -> int8\nconv_in input -> int8": r"Line 2 of the plan: line 1 is for conv_in, too",
    "{}": r"Expected a module's path",
    "conv_inn weight -> int8": r"has no linear or convolution conv_inn\. Did you mean 'conv_in'",
    "%conv2dd weight -> int8": r"Did you mean '%conv2d'",
    "nowhere weight -> int8": r"`tfqc inspect --plan` prints the names",
    "conv_in wait -> int8": r"has no operand 'wait', but input, weight, bias: did you mean 'weight'",
    "conv_in weight -> int8{per=token}": r"a weight is the same for every token",
    "conv_in weight -> int8{per=step}": r"a weight is the same for every step",
    "conv_in input -> int8{channels=0,3},int4{channels=3,9}": r"channels 0 to 9 are not all: there are \d",
    "conv_in input -> int8{steps=0,3},int4{steps=3,5}": r"steps 0 to 5 are not all: there are 4",
    "conv_in input -> int8{steps=1,4}": r"steps 1 to 4 are not all",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_line_is_named(text: str, subject: Subjects) -> None:
    number = text.count("\n") + 2
    with pytest.raises(SpecError, match=BAD[text].replace("Line 2", "Line 3").replace("line 1", "line 2")) as caught:
        bind_plan(subject("unet2d").program, f"# a comment\n{text}", 4)
    assert str(caught.value).startswith(f"Line {number} of the plan: ")


def test_steps_of_what_runs_once_per_image(subject: Subjects) -> None:
    its = subject("unet-sd")
    text = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k input -> int8{per=step symmetric=false}"
    with pytest.raises(SpecError, match=r"Line 1 of the plan: .* runs once per image, where there are no steps"):
        bind_plan(its.program, text, 4)


@given(text=st.text(max_size=60) | st.text('conv_in weight->{}=,#%"\n int84', max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_plan(text)
    except SpecError as error:
        assert str(error).startswith("Line ")
