"""fuse-norms: norms with their activation, and what stands alone, become the kernels' operations."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import args_of, find, name_of
from tests.lowered import STATIC, W8, apply, before, example, parts, quantized, round_trip
from tests.subjects import Subjects, of_example
from tfqc.errors import PipelineError
from tfqc.ir.render import render

FLOAT = (None, None, None, "f32")


def test_norms_and_quantizers() -> None:
    its = parts()
    program = apply("fuse-norms", before("fuse-norms", its))
    image = program.node("silu_1")
    assert name_of(image) == "tfqc.norm.default"
    assert [str(n) for n in args_of(image)] == [
        "silu", "4", "w_norm1_weight", "w_norm1_bias", "1e-05", "silu", "None", "None", "None", "f32"
    ]  # fmt: skip
    tokens = program.node("layer_norm")
    assert args_of(tokens)[1] == 0 and args_of(tokens)[4:] == (1e-05, "none", *FLOAT)
    assert "group_norm" not in {n.name for n in program.step.nodes}
    codes = program.node("reshape_q")
    assert name_of(codes) == "tfqc.map.default"
    assert args_of(codes)[1:3] == ("none", program.node("row")) and args_of(codes)[-1] == "u8"
    assert not find(program, "tfqc.quantize") and not find(program, "aten.layer_norm")
    assert name_of(program.node("add")) == "aten.add.Tensor"  # of a number
    round_trip(its, program)


def test_rows_of_the_schedule(subject: Subjects) -> None:
    its = subject("dit")
    program = apply("fuse-norms", before("fuse-norms", its))
    norms = find(program, "tfqc.norm")
    assert len(norms) == 5 and not find(program, "norm_rows")
    assert all(name_of(args_of(n)[2]) == "tfqc.request_read.default" for n in norms)
    round_trip(its, program)


class Alone(nn.Module):
    """Activations and sums that follow no product."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner = nn.Linear(1, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x * self.time(time.float()[:, None] / 1000)[:, None]
        x = F.gelu(F.silu(x), approximate="tanh") + F.gelu(x)
        value, gate = x.chunk(2, dim=2)
        wide = value * F.gelu(gate)
        return self.inner(F.pad(wide, (0, 6))) * 2.0 + F.silu(x)


ALONE = example(Alone, 5, 12)


def test_what_stands_alone() -> None:
    its = of_example("alone", ALONE)
    program = apply("fuse-norms", before("fuse-norms", its, activations=STATIC))
    maps = find(program, "tfqc.map")
    assert [args_of(n)[1] for n in maps] == ["silu", "gelu_tanh", "gelu", "geglu", "none", "silu"]
    assert args_of(maps[4])[2] is None and args_of(maps[4])[-1] == "u8"  # a static range has no row
    assert len(find(program, "tfqc.gated_add")) == 2
    assert all(args_of(n)[1] is None for n in find(program, "tfqc.gated_add"))
    round_trip(its, program)


class Other(nn.Module):
    """Norms over two dimensions, activations without tokens, sums of unlike operands."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner, self.norm = nn.Linear(1, 12), nn.Linear(12, 12), nn.LayerNorm((5, 12))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.norm(x + self.time(time.float()[:, None] / 1000)[:, None])
        pooled = F.silu(x.mean(1))
        rows = F.layer_norm(x.reshape(-1, 12), (12,)).reshape(x.shape)
        return self.inner(rows + pooled[:, None]).add(x, alpha=2)


OTHER = example(Other, 5, 12)


def test_unchanged() -> None:
    old = before("fuse-norms", of_example("other", OTHER), weights=W8, activations="")
    assert len(find(old, "norm")) == 2
    assert render(apply("fuse-norms", old)) == render(old)


def test_codes_of_four_bits_are_left() -> None:
    old = quantized(parts(), W8, "calibrate-activations{bits=4}")
    program = apply("fuse-norms", old)
    assert len(find(program, "tfqc.quantize.")) == len(find(old, "tfqc.quantize."))
    assert find(program, "tfqc.norm")


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("fuse-norms")
