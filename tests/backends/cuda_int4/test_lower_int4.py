"""lower-int4: codes of 4 and 8 bits meet 4-bit weights, and what torch runs says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, name_of
from tests.lowered import W8, apply, before, example, parts, quantized, round_trip
from tests.models import odd_names
from tests.subjects import Subject, Subjects, of_example
from tfqc.backends.cuda_int4.tensor_cores import is_step_row, why_not_tensor_cores
from tfqc.errors import PipelineError
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.views import Conv, Linear
from tfqc.lowering.windows import window_of
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.runtime.packing import unpack_int4

W4 = "calibrate-weights{bits=4 method=min-max}"
A4 = "calibrate-activations{bits=4 mode=per-step}"
A8 = "calibrate-activations{bits=8 mode=per-step}"
STATIC = "calibrate-activations{bits=4 mode=static}"
GROUPS = "it has groups or a dilation"  # of the one convolution of `Parts` that stays
ENDING = ("none", None, None, None, None, None, "f32")
NO_BRANCH = (None, None)  # of low rank


def reasons(program: Program) -> set[str]:
    """Why linears and convolutions are left, without an empty one for those that are not."""
    layers = (Linear.of(n) or Conv.of(n) for n in program.nodes())
    return {why_not_tensor_cores(program, layer) for layer in layers if layer is not None} - {""}


def lowered(its: Subject, weights: str = W4, activations: str = A4) -> Program:
    return apply("lower-int4", quantized(its, weights, activations))


# -- what becomes a product ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("activations", "out"), [(A4, "u4"), (A8, "u8")])
def test_every_product(activations: str, out: str) -> None:
    its = parts()
    old = quantized(its, W4, activations)
    program = apply("lower-int4", old)
    assert (len(find(program, "tfqc.qconv")), len(find(program, "tfqc.qlinear"))) == (4, 8)
    assert reasons(program) == {GROUPS}
    conv = program.node("conv2d_2")
    codes, scale, zero, row, weight, weight_scale, bias, stride, padding, groups = args_of(conv)[:10]
    assert [str(n) for n in (codes, row)] == ["reshape_q_codes", "row"]
    assert args_of(codes) == (program.node("reshape"), "none", row, scale, zero, out)  # type: ignore[union-attr]
    assert [n.target for n in (scale, zero, weight, weight_scale, bias)] == [  # type: ignore[union-attr]
        "act.reshape.scale", "act.reshape.zero_point", "shrink.weight.codes", "shrink.weight.scale.flat", "shrink.bias"
    ]  # fmt: skip
    assert (stride, padding, groups) == (2, 1, 1) and args_of(conv)[10:] == ENDING
    linear = program.node("linear_5")
    assert args_of(linear)[7:] == (*ENDING, *NO_BRANCH)
    assert program.tensors[str(args_of(linear)[5].target)].shape == (64,)  # type: ignore[union-attr]
    image, pixels = program.node("conv2d"), program.node("conv2d_4")
    assert window_of(program, image) == (6, 6) and window_of(program, pixels) is None
    round_trip(its, program)


def test_a_row_of_the_schedule_may_be_the_bias() -> None:
    program = lowered(parts())
    bias = args_of(program.node("conv2d_1"))[6]
    assert bias is program.node("add_6") and is_step_row(program, bias)


def test_weights_become_bytes() -> None:
    old = quantized(parts(), W4, A4)
    program = apply("lower-int4", old)
    packed, codes = old.tensors["wide.weight.packed"], program.tensors["wide.weight.codes"]
    assert torch.equal(codes, unpack_int4(packed, (64, 16)))
    assert "wide.weight.packed" not in program.tensors and "grow.weight.packed" in program.tensors


def test_what_several_read_is_quantized_once() -> None:
    program = lowered(parts())
    (codes,) = [n for n in find(program, "tfqc.map") if str(args_of(n)[0]) == "transpose"]
    assert [n.name for n in codes.users] == ["linear_1", "linear_2", "linear_3"]
    assert not [n for n in find(program, "tfqc.quantize") if str(args_of(n)[0]) != "upsample_nearest2d"]


def test_static_ranges_have_no_row() -> None:
    program = lowered(parts(), activations=STATIC)
    for node in find(program, "tfqc.qlinear"):
        assert args_of(node)[3] is None and args_of(args_of(node)[0])[2] is None  # type: ignore[union-attr]
        assert program.tensors[str(args_of(node)[1].target)].shape == (1,)  # type: ignore[union-attr]


@pytest.mark.parametrize("bits", [4, 8])
def test_per_token(bits: int) -> None:
    its = parts()
    program = lowered(its, activations=f"calibrate-activations{{mode=per-token bits={bits}}}")
    tokens = find(program, "tfqc.quantize_tokens")
    assert len(tokens) == 6 and not find(program, "quantize_dynamic")
    assert {args_of(n)[1:] for n in tokens} == {(bits,)}
    for node in find(program, "tfqc.qlinear"):
        source = args_of(args_of(node)[0])[0]  # type: ignore[union-attr]
        assert [(args_of(n)[0], args_of(n)[1]) for n in args_of(node)[:3]] == [(source, i) for i in range(3)]  # type: ignore[union-attr]
        assert args_of(node)[3] is None and source in tokens
    three = [args_of(args_of(program.node(f"linear_{i}"))[0])[0] for i in (1, 2, 3)]  # type: ignore[union-attr]
    assert len(set(three)) == 1
    codes = args_of(program.node("conv2d_1"))[0]
    assert name_of(codes) == "tfqc.map.default" and args_of(codes)[5] == f"u{bits}"  # type: ignore[union-attr]
    round_trip(its, program)


def test_values_are_read_as_they_are() -> None:
    """An input that is not quantized is multiplied in floating point by codes."""
    its = parts()
    program = lowered(its, activations="")
    assert len(find(program, "tfqc.q")) == 12 and not find(program, "tfqc.map")
    assert args_of(program.node("linear_1"))[:4] == (program.node("transpose"), None, None, None)
    assert reasons(program) == {GROUPS}
    round_trip(its, program)


class Wide(nn.Module):
    """Enough columns for two groups of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.spread = nn.Linear(1, 2), nn.Conv2d(2, 160, 3, padding=1)
        self.pixels, self.image = nn.Conv2d(160, 160, 1), nn.Conv2d(160, 2, 3, padding=1)
        self.tokens = nn.Linear(160, 160)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.spread(x + self.time(time.float()[:, None] / 1000)[:, :, None, None])
        h = F.silu(self.pixels(h))
        h = self.tokens(h.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(h.shape)
        return self.image(h)


WIDE = example(Wide, 2, 4, 4)
OF_GROUPS = "its weight has a scale for each {} columns: kernels take 128, of linears and windows of 1 x 1"


def test_groups_of_columns() -> None:
    its = of_example("wide-int4", WIDE)
    program = lowered(its, "calibrate-weights{bits=4 method=min-max group=128}")
    scales = {
        str(n): program.tensors[str(args_of(n)[5].target)].shape
        for n in find(program, "tfqc.q")
        if len(args_of(n)) > 10
    }  # type: ignore[union-attr]
    assert scales == {"conv2d": (160,), "conv2d_1": (160, 2), "linear_1": (160, 2)}
    assert reasons(program) == {OF_GROUPS.format(128)}  # the 3 x 3 of 160 channels: there is no kernel with both
    round_trip(its, program)


# -- what does not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "activations", "reason"),
    [
        ("calibrate-weights{bits=4 method=min-max group=5}", A4, OF_GROUPS.format(5)),
        ("calibrate-weights{bits=4 method=min-max symmetric=false}", A4, "its weight's zero points are not 0"),
        (W8, A4, "its weight has more than 4 bits"),
        ("", A4, "its weight is in floating point"),
        (W4, "calibrate-activations{bits=5 mode=per-step}", "its input's codes lie in 0..31"),
    ],
)
def test_left_to_torch(weights: str, activations: str, reason: str) -> None:
    old = quantized(parts(), weights, activations)
    assert reasons(old) - {GROUPS} == {reason}
    assert render(apply("lower-int4", old)) == render(old)


def test_five_bits_per_token() -> None:
    old = quantized(parts(), W4, "calibrate-activations{mode=per-token bits=5}")
    assert reasons(old) == {GROUPS, "its input has 5 bits", "its input's codes lie in 0..31"}
    assert render(apply("lower-int4", old)) == render(old)


def test_edges_of_eight_bits() -> None:
    program = lowered(parts(), "calibrate-weights{bits=4 method=min-max edge-bits=8}")
    assert [n.name for n in find(program, "aten.conv2d")] == ["conv2d", "conv2d_3", "conv2d_4"]
    assert reasons(program) == {GROUPS, "its weight has more than 4 bits"}


class Strange(nn.Module):
    """What the kernels have no shape for."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.dilated, self.grouped = nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.large, self.bare = nn.Conv2d(4, 4, 5, padding=2), nn.Conv2d(4, 4, 3)
        self.skips, self.uneven = nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 4, 3, stride=(1, 2), padding=1)
        self.line, self.flat = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.endless = nn.Linear(2**16 + 1, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)
        h = self.grouped(F.relu(self.dilated(x + when[:, :, None, None])))
        h = F.pad(self.skips(self.bare(self.large(h))), (0, 4, 0, 4))
        h = F.pad(self.uneven(h), (0, 3))
        tokens = self.line(h.flatten(2)).transpose(1, 2)
        rows = self.flat(tokens.reshape(-1, 4)).reshape(x.shape[0], 36, 4)
        many = self.endless(F.pad(rows.flatten(1), (0, 2**16 + 1 - 144)))
        return (rows + many[:, None, :1]).transpose(1, 2).reshape(x.shape)


STRANGE = example(Strange, 4, 6, 6)


def test_shapes_without_kernels() -> None:
    old = quantized(of_example("strange-int4", STRANGE), W4, A4)
    window = "its window is {} x {} with stride {} and padding {}"
    assert reasons(old) == {
        GROUPS,
        window.format(5, 5, 1, (2, 2)),
        window.format(3, 3, 1, (0, 0)),
        window.format(1, 1, 2, (0, 0)),
        window.format(3, 3, 1, (1, 1)),  # the other stride is 2
        "it is a convolution in one dimension",
        "the first dimension of its input is not the batch",
        "its sums do not fit into 32 bits",
    }
    assert render(apply("lower-int4", old)) == render(old)


def test_sizes_that_are_not_known() -> None:
    model, inputs = odd_names()
    program = capture(model, inputs, roles={"a": "sample", "b": "time"}, dynamic={"a": {2: "H", 3: "W"}})
    its = Subject("odd-sizes-int4", model, inputs, Pipeline.parse("normalize,discover-tib").run(program))
    old = quantized(its, W4, A4)
    assert reasons(old) == {"the height and width of its input are not known when it is compiled"}
    assert render(apply("lower-int4", old)) == render(old)


@pytest.mark.parametrize("name", ["unet2d-classes", "unet2d-labels"])
def test_a_bias_of_each_entry(name: str, subject: Subjects) -> None:
    """Rows that a request chooses, and rows for each label: a launch has one row for all of its batch."""
    old = quantized(subject(name), W4, A4)
    assert reasons(old) == {"its bias is computed at run time"}
    program = apply("lower-int4", old)
    left = find(program, "conv2d_rows")
    assert len(left) == 8 and not any(is_step_row(program, args_of(n)[2]) for n in left)


def test_the_report() -> None:
    ctx = Context()
    program = Pipeline.parse("lower-int4").run(quantized(parts(), W4, A4), ctx)
    assert list(ctx.report) == ["lowered to tensor cores: 12 linears and convolutions"]
    again = Context()
    assert render(Pipeline.parse("lower-int4").run(program.clone(), again)) == render(program)
    assert not again.report


def test_refused_and_done() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("lower-int4")
    done = before("half-precision", parts(), "cuda-int4", W4, A4)
    assert render(apply("lower-int4", done)) == render(done)
