"""Planning: the reasons that it gives are the options that it was given."""

from __future__ import annotations

import pytest

from tests.subjects import Subjects
from tfqc.analysis.weighted import weighted_nodes
from tfqc.passing import Context
from tfqc.quant.plan import planned
from tfqc.quant.planning import start_plan, undoing


@pytest.mark.parametrize(
    ("options", "module", "operand", "advice"),
    [
        ("edges=8", "conv_in", "weight", "say edges=none"),
        ("edges=8", "conv_in", "input", "say edges=none"),
        ("skip=conv_in", "conv_in", "weight", "leave skip out"),
        ("activations=none", "conv_in", "input", "give activations bits"),
        ("weights=none", "conv_in", "weight", "give weights bits"),
        ("edges=8", "mid_block.resnets.0.conv1", "weight", ""),
        ("scope=tib", "time_embedding.linear_1", "weight", ""),
    ],
)
def test_a_reason_says_which_option_to_set(
    options: str, module: str, operand: str, advice: str, subject: Subjects
) -> None:
    bits = "" if "none" in options else "weights=4 activations=4 "
    program = subject("unet2d").run(f"plan-quantization{{{bits}{options}}}")
    (node,) = (n for n in weighted_nodes(program) if program.origins[n.name].module == module)
    (spec,) = planned(program, node, operand)
    assert undoing(spec.why) == advice


def test_a_plan_that_is_there_is_kept(subject: Subjects) -> None:
    program = subject("unet2d").program
    start_plan(program, Context(plan="conv_in weight -> int4"))
    start_plan(program, Context(plan="conv_in weight -> int8"))
    (node,) = (n for n in weighted_nodes(program) if program.origins[n.name].module == "conv_in")
    assert [str(spec) for spec in planned(program, node, "weight")] == ["int4"]
