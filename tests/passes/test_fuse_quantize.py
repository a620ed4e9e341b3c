"""fuse-quantize: what is only read as codes is stored as codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, name_of
from tests.lowered import PER_TOKEN, apply, before, example, parts, round_trip
from tests.subjects import Subjects, of_example
from tfqc.errors import PipelineError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType


def stored(program: Program, name: str) -> torch.dtype:
    type_ = program.type(program.node(name))
    assert isinstance(type_, TensorType)
    return type_.dtype


def test_codes_where_they_are_computed() -> None:
    its = parts()
    old = before("fuse-quantize", its)
    program = apply("fuse-quantize", old)
    codes = ["layer_norm", "mul_3", "layer_norm_1", "gelu_1"]  # norms and products
    codes += ["add_5", "transpose_5", "reshape"]  # past views
    codes += ["conv2d_2", "upsample_nearest2d", "scaled_dot_product_attention", "transpose_4", "flatten_1"]
    assert {stored(program, name) for name in codes} == {torch.uint8}
    for name in ("layer_norm", "add_5", "conv2d_2", "scaled_dot_product_attention"):
        ending = program.node(name).kwargs
        row, scale, zero, out = (ending[k] for k in ("row", "out_scale", "out_zero_point", "out"))
        assert (str(row), out) == ("row", "u8")
        assert str(scale.target) == str(zero.target).replace("zero_point", "scale")  # type: ignore[union-attr]
    assert program.node("add_5").kwargs["out_scale"].target == "act.reshape.scale"  # type: ignore[union-attr]
    # Read by others too, or computed by torch: the first convolution's input, both sums, the concatenation.
    left = [n.name for n in find(program, "tfqc.map")]
    assert left == ["x_q", "add_q", "transpose_q", "cat_q"]
    assert all(stored(program, name) is torch.float32 for name in ("add", "add_2", "transpose", "cat", "add_3"))
    round_trip(its, program)


@pytest.mark.parametrize("name", ["unet-sd", "dit"])
def test_the_report(name: str, subject: Subjects) -> None:
    its = subject(name)
    program = before("fuse-quantize", its)
    ctx = its.context()
    quantizers = [n for n in find(program, "tfqc.map") if args_of(n)[1] == "none"]
    its.run("fuse-quantize", ctx, program)
    left = [n for n in find(program, "tfqc.map") if args_of(n)[1] == "none"]
    assert list(ctx.report) == [
        f"quantized where it is computed: {len(quantizers) - len(left)} of {len(quantizers)} values"
    ]
    assert 0 < len(left) < len(quantizers)
    assert all(len(args_of(n)[0].users) > 1 or name_of(args_of(n)[0]) == "tfqc.channels_last.default" for n in left)  # type: ignore[union-attr]  # fmt: skip
    round_trip(its, program)


def test_unchanged() -> None:
    old = before("fuse-quantize", parts(), activations="")
    assert not find(old, "tfqc.map.default(none")
    assert render(apply("fuse-quantize", old)) == render(old)
    done = apply("fuse-quantize", before("fuse-quantize", parts()))
    assert render(apply("fuse-quantize", done)) == render(done)


def test_tokens_keep_their_own_ranges() -> None:
    old = before("fuse-quantize", parts(), activations=PER_TOKEN)
    program = apply("fuse-quantize", old)
    assert len(find(program, "quantize_tokens")) == len(find(old, "quantize_tokens")) == 6
    assert stored(program, "layer_norm") is torch.float32


class Rows(nn.Module):
    """Products that read what a product gives: as it is, through a view, as windows of an image, and both."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.enter = nn.Linear(1, 2), nn.Conv2d(2, 16, 1)
        self.pixels, self.both, self.one = (nn.Conv2d(16, 16, 1) for _ in range(3))
        self.window, self.nine = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.wide, self.narrow, self.image = nn.Linear(16, 64), nn.Linear(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.time(time.float()[:, None] / 1000)[:, :, None, None]
        h = self.both(self.window(self.pixels(self.enter(x))))
        h = self.one(h) + self.nine(h)
        value, gate = self.wide(h.flatten(2).transpose(1, 2)).chunk(2, dim=-1)
        h = self.narrow(value * F.gelu(gate))
        return self.image(h.transpose(1, 2).reshape(x.shape[0], 16, 6, 6))


ROWS = example(Rows, 2, 6, 6)
W4, A4 = "calibrate-weights{bits=4 method=min-max}", "calibrate-activations{bits=4 mode=per-step}"


def test_rows_alone() -> None:
    """Kernels write rows: what is read as windows of an image, or through a view, is quantized by itself."""
    its = of_example("rows-int4", ROWS)
    old = before("fuse-quantize", its, "cuda-int4", W4, A4)
    program = apply("fuse-quantize{rows=true}", old)
    assert {stored(program, name) for name in ("conv2d", "conv2d_2", "mul")} == {torch.uint8}
    assert program.node("mul").kwargs["act"] == "geglu" and program.node("mul").kwargs["out"] == "u4"
    left = [str(args_of(n)[0]) for n in find(program, "tfqc.map")]
    assert left == ["add", "conv2d_1", "conv2d_3", "transpose", "reshape"]
    round_trip(its, program)
    more = apply("fuse-quantize", old)
    assert {stored(more, name) for name in ("conv2d_1", "conv2d_3", "reshape")} == {torch.uint8}


def test_rows_unchanged() -> None:
    done = apply(
        "fuse-quantize{rows=true}", before("fuse-quantize", of_example("rows-int4", ROWS), "cuda-int4", W4, A4)
    )
    assert render(apply("fuse-quantize{rows=true}", done)) == render(done)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("fuse-quantize")
