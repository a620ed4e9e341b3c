"""lower-int8: codes meet codes, and what stays in floating point says why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, name_of
from tests.lowered import A8, PER_TOKEN, STATIC, W8, apply, before, example, parts, quantized, round_trip
from tests.subjects import of_example
from tfqc.backends.cpu_int8.integer import why_not_integer
from tfqc.errors import PipelineError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.views import Conv, Linear
from tfqc.runtime.packing import unpack_int4

ENDING = ("none", None, None, None, None, None, "f32")
NO_BRANCH = (None, None)  # of low rank


def reasons(program: Program) -> set[str]:
    layers = (Linear.of(n) or Conv.of(n) for n in program.nodes())
    return {why_not_integer(program, layer) for layer in layers if layer is not None}


def test_every_product() -> None:
    its = parts()
    program = apply("lower-int8", quantized(its))
    assert (len(find(program, "tfqc.qconv")), len(find(program, "tfqc.qlinear"))) == (5, 8)
    assert not find(program, "dequantize") and not reasons(program)
    conv = program.node("conv2d_2")
    codes, scale, zero, row, weight, weight_scale, bias, stride, padding, groups = args_of(conv)[:10]
    assert [str(n) for n in (codes, row)] == ["reshape_q", "row"]
    assert args_of(codes)[1:3] == (scale, zero)  # type: ignore[union-attr]
    assert [n.target for n in (weight, weight_scale, bias)] == [  # type: ignore[union-attr]
        "shrink.weight.codes", "shrink.weight.scale.flat", "shrink.bias"
    ]  # fmt: skip
    assert (stride, padding, groups) == (2, 1, 1) and args_of(conv)[10:] == ENDING
    assert args_of(program.node("conv2d_3"))[9] == 2
    assert args_of(program.node("conv2d_1"))[6] is program.node("add_6")  # a row of the schedule as bias
    linear = program.node("linear_5")
    assert args_of(linear)[7:] == (*ENDING, *NO_BRANCH)
    assert program.tensors[str(args_of(linear)[5].target)].shape == (64,)  # type: ignore[union-attr]
    round_trip(its, program)


def test_static_ranges_have_no_row() -> None:
    program = apply("lower-int8", quantized(parts(), activations=STATIC))
    for node in find(program, "tfqc.qlinear"):
        assert args_of(node)[3] is None
        assert program.tensors[str(args_of(node)[1].target)].shape == (1,)  # type: ignore[union-attr]


def test_per_token() -> None:
    its = parts()
    program = apply("lower-int8", quantized(its, activations=PER_TOKEN))
    tokens = find(program, "tfqc.quantize_tokens")
    assert len(tokens) == 6 and not find(program, "quantize_dynamic")
    linear = program.node("linear_5")
    source = args_of(args_of(linear)[0])[0]
    assert [args_of(n) for n in args_of(linear)[:3]] == [(source, i) for i in range(3)]
    assert args_of(linear)[3] is None
    assert name_of(args_of(program.node("conv2d_1"))[0]) == "tfqc.quantize.default"
    round_trip(its, program)


def test_four_bit_weights_become_bytes() -> None:
    its = parts()
    old = quantized(its, "calibrate-weights{method=min-max bits=4}")
    program = apply("lower-int8", old)
    assert len(find(program, "tfqc.q")) - len(find(program, "tfqc.quantize")) == 13
    packed, codes = old.tensors["wide.weight.packed"], program.tensors["wide.weight.codes"]
    assert torch.equal(codes, unpack_int4(packed, (64, 16)))
    assert "wide.weight.packed" not in program.tensors
    round_trip(its, program)


@pytest.mark.parametrize(
    ("weights", "activations", "reason"),
    [
        ("calibrate-weights{method=min-max group=5}", A8, "its weight has a scale for each group of columns"),
        ("calibrate-weights{method=min-max symmetric=false}", A8, "its weight's zero points are not 0"),
        (W8, "calibrate-activations{bits=4}", "its input's codes lie in 0..15"),
        (W8, "", "its input is in floating point"),
        ("", A8, "its weight is in floating point"),
    ],
)
def test_left_in_floating_point(weights: str, activations: str, reason: str) -> None:
    old = quantized(parts(), weights, activations)
    assert reasons(old) == {reason}
    assert render(apply("lower-int8", old)) == render(old)


def test_four_bits_per_token() -> None:
    old = quantized(parts(), W8, "calibrate-activations{mode=per-token bits=4}")
    assert reasons(old) == {"its input has 4 bits", "its input's codes lie in 0..15"}
    assert render(apply("lower-int8", old)) == render(old)


class Strange(nn.Module):
    """What the kernels have no shape for."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 4)
        self.dilated = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.uneven = nn.Conv2d(4, 4, 3, padding=(0, 2))
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.flat = nn.Linear(4, 4)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)
        h = self.dilated(F.relu(x + when[:, :, None, None]))
        h = F.pad(self.uneven(h), (0, -2, 1, 1))
        tokens = self.line(h.flatten(2)).transpose(1, 2)
        rows = self.flat(tokens.reshape(-1, 4))
        return rows.reshape(x.shape[0], 36, 4).transpose(1, 2).reshape(x.shape)


STRANGE = example(Strange, 4, 6, 6)


def test_shapes_without_kernels() -> None:
    old = quantized(of_example("strange", STRANGE))
    assert reasons(old) == {
        "its dilation is [2, 2]",
        "its stride or padding differs between height and width",
        "it is a convolution in one dimension",
        "the first dimension of its input is not the batch",
    }
    assert render(apply("lower-int8", old)) == render(old)


def test_refused_and_done() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("lower-int8")
    done = before("lower-attention", parts())
    assert render(apply("lower-int8", done)) == render(done)
