"""calibrate-weights: the grids of tfqc.quant.grid, on every weight that runs, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from tests.subjects import Subjects, assert_text_round_trip
from tfqc.analysis.weighted import weight_of, weighted_nodes
from tfqc.errors import CalibrationError, PipelineError, SpecError
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.grid import Grid, quantize_weight
from tfqc.quant.parameters import stored_weight

TIB = "select-maintenance{strategy=tib}"  # so that the block runs too


@pytest.mark.parametrize("options", ["bits=8", "bits=4 method=mse", "bits=3 symmetric=false", "bits=4 group=5",
                                     "bits=4 symmetric=false group=16", "bits=8 symmetric=false"])  # fmt: skip
def test_grids(options: str, subject: Subjects) -> None:
    its = subject("unet-sd")
    program = its.run(f"{TIB},calibrate-weights{{{options}}}", numerics=options == "bits=8")
    item = Pipeline.parse(f"calibrate-weights{{{options}}}").passes[0]
    nodes = list(weighted_nodes(program))
    assert set(program.table(Quantizer)) == {n.name for n in nodes}
    for node in nodes:
        row = program.table(Quantizer)[node.name]
        weight = program.tensors[weight_of(node) or ""]
        want = quantize_weight(weight, Grid(item.bits, item.symmetric), item.method, item.group)
        assert torch.equal(stored_weight(program, row), want.dequantize())
        assert torch.equal(program.tensors[row.weight_scale], want.scale)
        shift = program.tensors[row.weight_zero_point] - want.zero_point
        assert torch.equal(program.tensors[row.codes].int() - want.codes(), shift.flatten()[0].expand(weight.shape))
        assert program.tensors[row.codes].dtype == torch.int8
    assert_text_round_trip(program, its.call([951.0, 37.0]))


def test_calibrated_ones_are_unchanged(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run(f"{TIB},calibrate-weights{{bits=4}}")
    text = render(program)
    assert render(its.run("calibrate-weights{bits=8}", program=program)) == text


def test_folded_features_need_no_codes(subject: Subjects) -> None:
    its = subject("unet2d")
    every, folded = its.run(f"{TIB},calibrate-weights"), its.run("select-maintenance,calibrate-weights")
    gone = set(every.table(Quantizer)) - set(folded.table(Quantizer))
    assert gone == {n.name for n in weighted_nodes(every) if n.name in every.tables["tib"]}
    assert gone


def test_skip_and_edges(subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.run(f"{TIB},calibrate-weights{{bits=4 edge-bits=8 skip=mid_block,up_blocks.0}}")
    rows = program.table(Quantizer)
    names = [program.origins[n].module for n in rows]
    assert not any(n.startswith(("mid_block", "up_blocks.0")) for n in names)
    assert any(n.startswith("up_blocks.1") for n in names)
    wide = {program.origins[n].module for n, row in rows.items() if row.weight_bits == 8}
    assert wide == {"conv_in", "conv_out"} or len(wide) == 2


def test_on_the_meta_device(subject: Subjects) -> None:
    for options in ("bits=4", "bits=4 group=5", "bits=8 symmetric=false"):
        its = subject("unet2d")
        program = its.program
        program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
        its.run(f"{TIB},calibrate-weights{{{options}}}", program=program)
        assert render(program) == render(its.run(f"{TIB},calibrate-weights{{{options}}}"))


def test_a_constant_channel(subject: Subjects) -> None:
    its = subject("unet2d")
    for value in (0.0, 0.25):
        program = its.program
        weight = program.tensors["conv_in.weight"].clone()
        weight[3] = value
        program.tensors["conv_in.weight"] = weight
        for options in ("bits=4", "bits=4 method=mse", "bits=4 symmetric=false"):
            done = its.run(f"{TIB},calibrate-weights{{{options}}}", program=program.clone())
            row = next(r for r in done.table(Quantizer).values() if r.codes.startswith("conv_in.weight"))
            assert bool((done.tensors[row.weight_scale] > 0).all())
            assert torch.allclose(stored_weight(done, row)[3], weight[3], rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value: float, subject: Subjects) -> None:
    its = subject("unet2d")
    program = its.program
    program.tensors["conv_out.weight"] = program.tensors["conv_out.weight"].clone().fill_(value)
    with pytest.raises(CalibrationError, match=r"Weight @conv_out.weight of %\w+ \(conv_out.* holds NaN or infinity"):
        its.run(f"{TIB},calibrate-weights", program=program)
    for bits in (1, 9):
        with pytest.raises(SpecError, match=r"out of range: weights have 2 to 8 bits"):
            Pipeline.parse(f"calibrate-weights{{bits={bits}}}")


def test_one_weight_read_twice(subject: Subjects) -> None:
    """Two nodes read one weight, with different bits: both keep their own codes."""
    its = subject("pixart")
    program = its.program
    by_shape: dict[object, list[fx.Node]] = {}
    for node in list(weighted_nodes(program))[1:-1]:
        by_shape.setdefault(program.tensors[weight_of(node) or ""].shape, []).append(node)
    inner, *_, last = next(nodes for nodes in by_shape.values() if len(nodes) > 1)
    last.update_kwarg("weight", inner.kwargs["weight"])
    program.prune()
    skip = program.origins[last.name].module
    its.run(f"{TIB},calibrate-weights{{bits=4 skip={skip}}},calibrate-weights{{bits=8}}", program=program)
    for node, bits in ((inner, 4), (last, 8)):
        row = program.table(Quantizer)[node.name]
        want = quantize_weight(program.tensors[weight_of(node) or ""], Grid(bits, symmetric=True)).dequantize()
        assert row.weight_bits == bits
        assert torch.equal(stored_weight(program, row), want)


def test_refused_before_it_is_known_what_runs(subject: Subjects) -> None:
    with pytest.raises(PipelineError, match=r"needs stage analyzed .* put select-maintenance before it"):
        subject("unet2d").run("calibrate-weights")


def test_linears_alone(subject: Subjects) -> None:
    """Groups of columns are those of linears and of convolutions of 1 x 1; what is left is another pass's."""
    its = subject("unet-sd")
    text = "select-maintenance,calibrate-weights{bits=4 group=8 scope=linear},calibrate-weights{bits=4}"
    program = its.run(text)
    groups: dict[bool, set[bool]] = {True: set(), False: set()}
    for name, row in program.table(Quantizer).items():
        windows = max(program.tensors[row.codes].shape[2:], default=1)
        groups[windows == 1].add("group" in row.weight_how)
        assert program.node(name)
    assert groups == {True: {True}, False: {False}}
