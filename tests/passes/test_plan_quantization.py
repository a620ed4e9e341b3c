"""plan-quantization: it alone chooses; other passes find parameters for what it says, or plan what it left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.lowered import context
from tests.subjects import Subject, Subjects, assert_text_round_trip
from tfqc.analysis.binding import edge_nodes
from tfqc.analysis.weighted import is_linear, weighted_nodes
from tfqc.errors import PassError, SpecError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer, QuantPlan, Tib
from tfqc.quant.formats import QuantSpec
from tfqc.quant.plan import planned

CALIBRATED = "select-maintenance{strategy=tib},reconstruct-weights,calibrate-weights,calibrate-activations"


def specs(program: Program, operand: str) -> dict[str, QuantSpec]:
    """The one spec of an operand of every layer, by the node's name."""
    return {n.name: spec for n in weighted_nodes(program) for spec in planned(program, n, operand)}


def test_every_operand_of_every_layer(subject: Subjects) -> None:
    its = subject("unet-sd")
    program = its.run("plan-quantization{weights=4 edges=8 method=mse group=8 group-scope=linear mode=per-step}")
    edges = [n.name for n in edge_nodes(program)]
    assert len(edges) == 2
    for node in weighted_nodes(program):
        (weight,), (value,) = planned(program, node, "weight"), planned(program, node, "input")
        assert weight.format.bits == (8 if node.name in edges else 4)
        assert (weight.per, weight.group) == (("group", 8) if is_linear(program, node) else ("channel", 0))
        assert (weight.range, weight.symmetric, value.symmetric) == ("mse", True, False)
        assert value.format.bits == 8
        per_request = (
            "attn2.to_k" in program.origins[node.name].module or "attn2.to_v" in program.origins[node.name].module
        )
        assert value.per == ("tensor" if per_request else "step")
        assert bool(value.why) == per_request
        assert {weight.by, value.by} == {"plan-quantization"}
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_per_token_is_for_linears(subject: Subjects) -> None:
    program = subject("unet-sd").run("plan-quantization{activations=4 edges=8 mode=per-token intervals=2}")
    for node in weighted_nodes(program):
        (spec,) = planned(program, node, "input")
        linear = "linear" in str(node.target)
        assert (spec.per, spec.intervals) == (("token", 0) if linear else ("step", 2))
        assert spec.format.bits == (8 if node in edge_nodes(program) else 4)


def test_what_is_left_in_floating_point_says_why(subject: Subjects) -> None:
    program = subject("unet2d").run("plan-quantization{activations=none skip=conv_in,up_blocks.1}")
    assert {s.why for s in specs(program, "input").values()} == {"activations=none"}
    left = {program.origins[n].module for n, s in specs(program, "weight").items() if not s.is_quantized}
    assert left and all(m == "conv_in" or m.startswith("up_blocks.1.") for m in left)
    assert {s.why for s in specs(program, "weight").values() if not s.is_quantized} == {"skip"}


def test_the_first_of_two_has_its_way(subject: Subjects) -> None:
    text = "plan-quantization{scope=tib weights=3 mode=per-step activation-method=fsc},plan-quantization{weights=4}"
    program = subject("unet2d").run(text)
    tib = program.table(Tib)
    for name, spec in specs(program, "weight").items():
        assert (spec.format.bits, spec.why) == ((3, "tib") if name in tib else (4, ""))
    assert {s.range for n, s in specs(program, "input").items() if n in tib} == {"fsc"}
    assert {s.range for n, s in specs(program, "input").items() if n not in tib} == {"min-max"}


OLD = {
    "weights": "calibrate-weights{bits=4 method=mse group=8 edge-bits=6}",
    "grids": "calibrate-weights{bits=3 symmetric=false}",
    "step": "calibrate-activations{bits=4 mode=per-step intervals=2 edge-bits=6}",
    "token": "calibrate-activations{bits=4 mode=per-token}",
    "searched": "calibrate-activations{bits=6 method=mse}",
}
NEW = {
    "weights": "plan-quantization{weights=4 activations=none method=mse group=8 edges=6},calibrate-weights",
    "grids": "plan-quantization{weights=3 activations=none symmetric=false},calibrate-weights",
    "step": "plan-quantization{weights=none activations=4 mode=per-step intervals=2 edges=6},calibrate-activations",
    "token": "plan-quantization{weights=none activations=4 mode=per-token},calibrate-activations",
    "searched": "plan-quantization{weights=none activations=6 activation-method=mse},calibrate-activations",
}


@pytest.mark.parametrize("case", OLD)
def test_options_of_other_passes_plan_the_same(case: str, subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")

    def run(text: str) -> Program:
        program = its.run(f"select-maintenance{{strategy=tib}},{text}", context(its, tmp_path))
        del program.tables[QuantPlan.table]
        return program

    assert render(run(OLD[case])) == render(run(NEW[case]))


def test_options_that_nothing_is_left_to_are_refused(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    for item, given in (("calibrate-weights{bits=4}", "bits"), ("calibrate-activations{mode=static bits=6}", "bits"),
                        ("reconstruct-weights{steps=2 group=8}", "group")):  # fmt: skip
        text = f"select-maintenance,plan-quantization{{weights=8 mode=per-step}},{item}"
        with pytest.raises(PassError, match=rf"plan-quantization has planned, .* give {given} to plan-quantization"):
            its.run(text, context(its, tmp_path))
    its.run("select-maintenance,plan-quantization{scope=tib},calibrate-weights{bits=4}", context(its, tmp_path))


def with_plan(its: Subject, plan: str, tmp_path: Path, text: str = "") -> Program:
    """The model calibrated for what a person wrote, the rest at four bits."""
    ctx = context(its, tmp_path)
    ctx.plan = plan
    return its.run(text or f"plan-quantization{{weights=4 activations=none}},{CALIBRATED}", ctx)


def test_what_a_person_wrote_comes_first(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    plan = (
        "conv_in weight -> int6{per=channel range=mse} input -> int8{per=step symmetric=false}\n"
        "conv_out weight -> float"
    )
    old = "select-maintenance{strategy=tib},calibrate-weights{bits=4},calibrate-activations{bits=2 skip=conv_out}"
    for text in ("", old):
        program = with_plan(its, plan, tmp_path, text)
        rows = {program.origins[n].module: row for n, row in program.table(Quantizer).items()}
        assert (rows["conv_in"].weight_bits, rows["conv_in"].input_bits) == (6, 8)
        assert program.tensors[rows["conv_in"].input_scale].numel() == 4
        assert "conv_out" not in rows
        assert rows["mid_block.resnets.0.conv1"].weight_bits == 4


REFUSED = {
    "conv_in weight -> fp8-e4m3{per=channel}": "passes quantize to integers, and fp8-e4m3 is none",
    "conv_in weight -> int8": "a weight has a scale for each channel or group, not per=tensor",
    "conv_in weight -> int8{per=channel smooth=s}": "no pass divides an operand by smoothing factors",
    "conv_in weight -> int8{per=channel channels=0,1},int4{per=channel channels=1,3}": "no pass splits an operand",
    "conv_in input -> int8{steps=0,2 symmetric=false},int4{steps=2,4 symmetric=false}": "no pass quantizes an operand",
    "conv_in input -> int8": "say symmetric=false",
    "conv_in input -> int8{per=channel symmetric=false}": "an input has one scale, or one for each",
    "conv_in input -> int8{per=token symmetric=false}": "per=token is for linears",
}


@pytest.mark.parametrize("plan", REFUSED)
def test_what_no_pass_can_do_yet(plan: str, subject: Subjects, tmp_path: Path) -> None:
    with pytest.raises(PassError, match=rf"\(conv_in.*\) is planned as .*: {REFUSED[plan]}"):
        with_plan(subject("unet2d"), plan, tmp_path)


def test_a_line_for_another_model(subject: Subjects, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"Line 2 of the plan: UNet2DModel has no linear or convolution nowhere"):
        with_plan(subject("unet2d"), "\nnowhere weight -> int4", tmp_path)


def test_what_is_planned_and_not_found_is_refused(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet2d")
    text = "plan-quantization,select-maintenance,calibrate-activations,fold-cache,insert-qdq"
    with pytest.raises(
        PassError, match=r"The weight of .* is planned as int8.* put calibrate-weights before insert-qdq"
    ):
        its.run(text, context(its, tmp_path))
    its.run(text.replace("plan-quantization", "plan-quantization{weights=none}"), context(its, tmp_path))
    with pytest.raises(PassError, match="no pass does, so plan it as float"):
        with_plan(its, "%conv2d bias -> int8", tmp_path, f"plan-quantization,{CALIBRATED},fold-cache,insert-qdq")
