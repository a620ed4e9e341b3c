"""split-concat: products of concatenated values become sums of products, with a scale for each value."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tfqc
from tests.backends.conformance import quantization_error
from tests.helpers import find, first, run_pass
from tests.lowered import context, example, round_trip
from tests.subjects import Subject, Subjects, calibration, of_example
from tfqc.analysis.weighted import weighted_nodes
from tfqc.codegen.target import Target
from tfqc.driver import load
from tfqc.errors import PipelineError
from tfqc.instruments.numerics import relative_error
from tfqc.ir.parse import parse
from tfqc.ir.render import render
from tfqc.ir.rows import Quantizer, QuantPlan
from tfqc.ir.views import Add, Conv, Product
from tfqc.passes.split_concat import SplitConcat
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Kernels for CUDA")


class Joined(nn.Module):
    """A convolution of a concatenation that a norm reads, too; a linear of three values, one of them in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(1, 8), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 6, 1)
        self.norm, self.conv = nn.GroupNorm(2, 14), nn.Conv2d(14, 8, 3, 2, 1)
        self.linear = nn.Linear(36, 4, bias=False)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b = self.a(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None], self.b(x)
        both = torch.cat([a, b], dim=-3)
        c = self.conv(both).flatten(2).transpose(1, 2)
        a, b, normed = (v.flatten(2)[:, :, ::4].transpose(1, 2) for v in (a, b, self.norm(both)))
        return self.linear(torch.cat([c, torch.cat([normed, b], 2), a], -1))


JOINED = example(Joined, 4, 6, 6)


def test_products_of_parts() -> None:
    its = of_example("joined", JOINED)
    ctx = Context()
    program = run_pass(its.program, SplitConcat(), ctx)
    assert ctx.report == ("split into parts by concatenated values: 3 linears and convolutions",)
    whole = Add.of(program.node("conv2d_2"))
    assert whole is not None
    second, one = Conv.of(whole.self_), Conv.of(whole.other)
    assert one is not None and second is not None and second.stride == one.stride == [2, 2]
    assert (one.node.name, second.node.name) == ("conv2d_2_part", "conv2d_2_part_1")
    assert (one.bias, second.bias) == (program.node("w_conv_bias"), None)
    assert program.origins["conv2d_2_part"] == program.origins["conv2d_2"] == its.program.origins["conv2d_2"]
    weight = its.model.get_parameter("conv.weight")
    assert torch.equal(program.tensors["conv.weight.part0"], weight[:, :8])
    assert torch.equal(program.tensors["conv.weight.part1"], weight[:, 8:])
    assert "conv.weight" not in program.tensors  # nothing reads it any more
    # The norm goes on reading both values; three values, one of them of two, are four products and three sums.
    assert [n.name for n in find(program, "aten.cat")] == ["cat"]
    widths = {name: t.shape[1] for name, t in program.tensors.items() if name.startswith("linear.weight")}
    assert widths == {
        "linear.weight.part0": 8, "linear.weight.part1.part0": 14, "linear.weight.part1.part1": 6,
        "linear.weight.part2": 8,
    }  # fmt: skip
    assert len(find(program, "aten.add")) == len(find(its.program, "aten.add")) + 1 + 3
    round_trip(its, program)


def test_weights_of_a_rehearsal() -> None:
    its = of_example("joined", JOINED)
    program = its.program
    program.tensors = {name: t.to("meta") for name, t in program.tensors.items()}
    program = Pipeline((SplitConcat(),)).run(program)
    assert program.tensors["conv.weight.part1"].is_meta and program.tensors["conv.weight.part1"].shape == (8, 6, 3, 3)


def test_what_is_planned_for_a_layer_is_planned_for_its_parts() -> None:
    its = of_example("joined", JOINED)
    program = its.run("plan-quantization{weights=4 activations=8},split-concat")
    rows = program.table(QuantPlan)
    assert rows.keys() == {n.name for n in weighted_nodes(program)} and "conv2d_2" not in rows
    assert rows["conv2d_2_part"] == rows["conv2d_2_part_1"] == rows["conv2d"]


class Left(nn.Module):
    """Concatenations that no product is split by."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.mixed = nn.Linear(1, 4), nn.Linear(8, 8)
        self.grouped, self.rows = nn.Conv2d(16, 8, 1, groups=2), nn.Conv2d(8, 8, 1)
        self.timed, self.alone = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)
        when = self.mixed(torch.cat([when, F.silu(when)], 1))[:, :, None, None]  # in the temporal block
        y = self.grouped(torch.cat([x + when, x], 1))
        y = self.rows(torch.cat([y, x], 2))  # the first behind the second, not beside it
        y = self.timed(torch.cat([y, when.expand(-1, -1, y.shape[2], y.shape[3])], 1))  # one part is known before
        return self.alone(torch.cat([y], 1))


def test_unchanged() -> None:
    its = of_example("left", example(Left, 8, 4, 4))
    assert len(find(its.program, "aten.cat")) >= 5
    assert render(run_pass(its.program, SplitConcat())) == render(its.program)


def test_refused() -> None:
    its = of_example("joined", JOINED)
    with pytest.raises(PipelineError, match="split-concat"):
        Pipeline.parse("select-maintenance,calibrate-weights,split-concat").run(its.program, its.context())
    with pytest.raises(PipelineError, match="tib"):
        Pipeline.parse("normalize,split-concat").check()


# -- what it is for -------------------------------------------------------------------------------------------------


class Louder(nn.Module):
    """b is 20 times as large as a, and weighs as much in what reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter = nn.Linear(1, 32), nn.Conv2d(4, 32, 3, padding=1)
        self.both, self.leave = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 4, 3, padding=1)
        self.both.weight.data[:, :32] *= 20

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a = torch.tanh(self.enter(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None])
        return self.leave(torch.tanh(self.both(torch.cat([a, 20 * a.flip(1)], 1)) / 20))


QUANTIZE = (
    "plan-quantization{weights=4 activations=4 method=mse edges=8},select-maintenance,calibrate-weights,"
    "calibrate-activations,fold-cache,insert-qdq"
)


def test_values_of_other_sizes_have_scales_of_their_own(tmp_path: Path) -> None:
    its = of_example("louder", example(Louder, 4, 8, 8))
    measured = its.run(f"split-concat,{QUANTIZE.partition(',fold')[0]}", context(its, tmp_path))
    rows = measured.table(Quantizer)
    a, b = (measured.tensors[rows[f"conv2d_1_{part}"].input_scale] for part in ("part", "part_1"))
    assert 15 < float(b / a) < 25
    errors = {
        text: quantization_error(its, its.run(text + QUANTIZE, context(its, tmp_path)), its.call([500.0, 250.0]))
        for text in ("", "split-concat,")
    }
    assert errors["split-concat,"] < 0.25 * errors[""], errors


def compiled(its: Subject, target: str, recipe: str, where: Path) -> tuple[tfqc.Artifact, nn.Module]:
    artifact = tfqc.compile(
        its.model, target, pipeline=recipe, schedule=DDIMScheduler(clip_sample=False), steps=4,
        calibration=calibration(its), example_inputs=its.inputs, workdir=where / "work",
        require_real=not target.startswith("fake-quant"),
    )  # fmt: skip
    return artifact, load(artifact.save(where / target.partition("{")[0]))


class Odd(nn.Module):
    """A window of 3 x 3 over 20 and 7 channels, of which neither fills a kernel's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.a, self.b = nn.Linear(1, 20), nn.Conv2d(4, 20, 3, padding=1), nn.Conv2d(4, 7, 1)
        self.both, self.leave = nn.Conv2d(27, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b = self.a(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None], self.b(x)
        return self.leave(self.both(torch.cat([a, b], dim=1)))


@pytest.mark.parametrize(
    ("target", "name", "splits"),
    [("cpu-int8", "unet-sd", 4), ("cpu-int8", "odd", 1), ("cuda-int4{arch=sm_86 mode=w4a8 edges=none}", "odd", 1)],
)
def test_parts_run_as_integers(target: str, name: str, splits: int, subject: Subjects, tmp_path: Path) -> None:
    """All products have kernels, the sums of parts are in their epilogues."""
    its = of_example("odd", example(Odd, 4, 8, 8)) if name == "odd" else subject(name)
    parsed = Target.parse(target)
    recipe = parsed.backend.pipeline(parsed.options, "fold").replace("plan-q", "split-concat,plan-q", 1)
    artifact, model = compiled(its, target, recipe, tmp_path)
    assert any(
        said.startswith(f"split into parts by concatenated values: {splits}") for said in artifact.facts["report"]
    )
    program = parse(artifact.texts["program.ir"])
    assert not find(program, "aten.conv2d") and not find(program, "aten.add")
    products = {n.name: Product(n) for n in find(program, "tfqc.qconv")}
    parts = [name for name in products if "_part" in name]
    assert len(parts) == splits  # the other parts are the sums
    for name in parts:
        part, (total,) = products[name], [p for p in products.values() if str(p.residual) == name]
        assert part.residual is None and {part.bias, total.bias} - {None} != {part.bias, total.bias}
        assert part.codes is not total.codes and part.scale is not total.scale
    _, simulated = compiled(its, "fake-quant", recipe, tmp_path)
    call = its.call([750.0])
    with torch.no_grad():
        assert relative_error(first(simulated(**call)), first(model(**call))) < 0.08  # codes that round otherwise
