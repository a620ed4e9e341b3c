"""Every invariant, broken: the verifier's sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from tests.tiny import tiny
from tfqc.errors import VerifyError
from tfqc.ir.program import TIME, Program, Role, Stage
from tfqc.ir.rows import Maintenance, Quantizer, RowSource, Tib
from tfqc.ir.types import ScalarType, TensorType, Type
from tfqc.ir.verify import Typed, verify
from tfqc.passing.pipeline import Pipeline

aten = torch.ops.aten


def normalized() -> Program:
    return Pipeline.parse("normalize,discover-tib").run(tiny())


def at_stage(stage: Stage) -> Program:
    """A program that has what its stage asks for."""
    program = normalized()
    program.stage = stage
    features = [name for name, row in program.table(Tib).items() if row.part == "feature"]
    program.set_table(Maintenance, {name: Maintenance(("fold",)) for name in features})
    program.tensors |= {"codes": torch.zeros(4, dtype=torch.int8), "scale": torch.ones(1)}
    program.set_table(Quantizer, {"linear": Quantizer(codes="codes", weight_scale="scale")})
    return program


def no_step(p: Program) -> None:
    p.functions.clear()


def uses_later(p: Program) -> None:
    p.node("div").update_kwarg("self", p.node("silu"))


def late_parameter(p: Program) -> None:
    with p.step.inserting_before(p.node("silu")):
        p.step.placeholder("late")


def no_tensor(p: Program) -> None:
    del p.tensors["time.0.bias"]


def two_reads(p: Program) -> None:
    with p.step.inserting_before(p.node("conv2d")):
        p.step.get_attr("time.0.bias")


def no_type(p: Program) -> None:
    del p.types["silu"]


def no_return(p: Program) -> None:
    p.step.erase_node(next(n for n in p.step.nodes if n.op == "output"))


def stale_type(p: Program) -> None:
    p.types["gone"] = TensorType(torch.float32, ())


def strange_parameter(p: Program) -> None:
    graph = torch.fx.Graph()
    graph.output(graph.placeholder("mask"))
    p.types["mask"] = TensorType(torch.float32, ())
    p.functions[TIME] = graph


def row_of_nothing(p: Program) -> None:
    p.set_table(Tib, {"gone": Tib("body")})


def row_of_no_tensor(p: Program) -> None:
    p.set_table(Quantizer, {"linear": Quantizer(codes="gone")})


def undeclared_input(p: Program) -> None:
    p.inputs = (*p.inputs, dataclasses.replace(p.inputs[0], name="mask", role=Role.REQUEST))


def put(p: Program, target: object, type_: Type, *args: object) -> None:
    with p.step.inserting_before(p.node("conv2d")):
        p.step.create_node("call_function", target, args, name="new")  # type: ignore[arg-type]
    p.types["new"] = type_


def assertion(p: Program) -> None:
    put(p, aten._assert_tensor_metadata.default, ScalarType("none"), p.node("silu"))


def dead(p: Program) -> None:
    put(p, aten.neg.default, p.types["silu"], p.node("silu"))


def in_place(p: Program) -> None:
    p.node("silu").target = aten.silu_.default


def undecided(p: Program) -> None:
    p.set_table(Maintenance, {})


def infinite(p: Program) -> None:
    p.tensors["scale"] = torch.tensor([float("inf")])


def zero_scale(p: Program) -> None:
    p.tensors["scale"] = torch.zeros(1)


def parameter_from_nowhere(p: Program) -> None:
    p.add_input("row", TensorType(torch.int64, (1,)))


def wrong_type(p: Program) -> None:
    p.types["conv2d"] = p.types["linear"]


def wrong_operand(p: Program) -> None:
    p.node("unsqueeze_1").update_kwarg("self", p.node("silu"))


def wrong_kind(p: Program) -> None:
    p.node("unsqueeze_2").update_kwarg("dim", 0.5)


@pytest.mark.parametrize(
    ("stage", "harm", "sentence"),
    [
        (Stage.NORMALIZED, wrong_type, "but aten.conv2d.default gives"),
        (Stage.NORMALIZED, wrong_operand, "but aten.unsqueeze.default gives"),
        (Stage.NORMALIZED, wrong_kind, "cannot take 0.5 as 'dim', which is int."),
        (Stage.CAPTURED, no_step, "it has no @step function."),
        (Stage.CAPTURED, uses_later, "%div in @step reads a value that is defined later or in another"),
        (Stage.CAPTURED, late_parameter, "parameter %late of @step stands after an operation."),
        (Stage.CAPTURED, no_tensor, "@step reads tensor @time.0.bias, which the program does not hold."),
        (Stage.CAPTURED, two_reads, "@step reads tensor @time.0.bias through two nodes."),
        (Stage.CAPTURED, no_type, "%silu (time.1, tiny.py:"),
        (Stage.CAPTURED, no_return, "@step returns nothing."),
        (Stage.CAPTURED, stale_type, "%gone has a type but does not exist."),
        (Stage.CAPTURED, strange_parameter, "@time has parameter %mask, which is no input of the model."),
        (Stage.CAPTURED, row_of_nothing, "table tib has a row for %gone, which does not exist."),
        (Stage.CAPTURED, row_of_no_tensor, "table quantizer, row linear: tensor @gone does not exist."),
        (Stage.CAPTURED, undeclared_input, "@step takes ['sample', 'timestep'] but the model's inputs are"),
        (Stage.NORMALIZED, assertion, "%new is an assertion: normalize removes them."),
        (Stage.NORMALIZED, dead, "%new has no reader: normalize removes dead nodes."),
        (Stage.NORMALIZED, in_place, "works in place: normalize rewrites such operations."),
        (Stage.ANALYZED, undecided, "temporal feature %unsqueeze_2 has no maintenance: select-maintenance"),
        (Stage.CALIBRATED, infinite, "quantizer of %linear: @scale holds NaN or infinity."),
        (Stage.CALIBRATED, zero_scale, "quantizer of %linear: @scale holds a scale that is not positive."),
        (Stage.FOLDED, parameter_from_nowhere, "@step has parameter %row, and nothing says where its value"),
    ],
)  # fmt: skip
def test_broken(stage: Stage, harm: Callable[[Program], None], sentence: str) -> None:
    program, typed = at_stage(stage), Typed()
    verify(program, typed=typed)
    harm(program)
    with pytest.raises(VerifyError) as error:
        verify(program, "#3 some-pass")
    told = [str(error.value), *error.value.notes]
    with pytest.raises(VerifyError) as error:
        verify(program, "#3 some-pass", typed=typed)
    assert [str(error.value), *error.value.notes] == told  # what was right before is looked at again
    assert told[0].startswith(f"The program is not a valid {stage} program after #3 some-pass: ")
    assert any(sentence in line for line in told), told


def test_a_folded_program_may_take_less_and_more() -> None:
    program = at_stage(Stage.FOLDED)
    parameter_from_nowhere(program)
    program.set_table(RowSource, {"row": RowSource("row")})
    verify(program)


@pytest.mark.parametrize("harm", [assertion, dead, in_place])
def test_a_captured_program_may_have_what_normalize_removes(harm: Callable[[Program], None]) -> None:
    program = tiny()
    harm(program)
    verify(program)


def test_several_problems_are_told_at_once() -> None:
    program = at_stage(Stage.NORMALIZED)
    dead(program)
    stale_type(program)
    with pytest.raises(VerifyError) as error:
        verify(program)
    assert len(error.value.notes) == 2  # a dead node, made by position
