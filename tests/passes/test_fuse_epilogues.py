"""fuse-epilogues: activations, gates and residual sums go into the product before them, and nothing else does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tests.helpers import args_of, find, name_of
from tests.lowered import apply, before, example, parts, round_trip
from tests.subjects import Subjects, of_example
from tfqc.errors import PipelineError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType


def epilogue(program: Program, name: str) -> tuple[object, ...]:
    """act, gate and residual of a product, values by name."""
    node = program.node(name)
    at = {"tfqc.qlinear.default": 7, "tfqc.qconv.default": 10}[str(node.target)]
    act, *rest = args_of(node)[at : at + 3]
    return (act, *(None if n is None else str(n) for n in rest))


def products(program: Program) -> list[fx.Node]:
    return [n for n in program.nodes() if name_of(n) in ("tfqc.qlinear.default", "tfqc.qconv.default")]


def test_every_ending() -> None:
    its = parts()
    program = apply("fuse-epilogues", before("fuse-epilogues", its))
    assert epilogue(program, "silu") == ("silu", None, None)
    assert epilogue(program, "add_2") == ("none", None, "silu")
    assert epilogue(program, "add_3") == ("none", None, "transpose")  # the product is the second summand
    assert epilogue(program, "mul_3") == ("geglu", None, None)
    assert epilogue(program, "gelu_1") == ("gelu_tanh", None, None)
    assert epilogue(program, "add_5") == ("none", "unsqueeze_3", "add_4")
    type_ = program.type(program.node("mul_3"))
    assert isinstance(type_, TensorType) and type_.shape == ("B", 36, 32)
    assert not any(find(program, op) for op in ("chunk", "aten.gelu", "aten.mul"))
    # Of a norm; not onto a product; and two that nothing follows.
    assert [n.name for n in find(program, "aten.silu")] == ["silu_1"]
    assert epilogue(program, "conv2d_3") == epilogue(program, "linear_1") == ("none", None, None)
    round_trip(its, program)


def test_gates_are_left_where_kernels_have_none() -> None:
    """And what follows them: the sum behind a gate is no sum of the product."""
    its = parts()
    old = before("fuse-epilogues", its)
    program = apply("fuse-epilogues{gates=false}", old)
    assert epilogue(program, "linear_8") == ("none", None, None)
    assert [str(n) for n in args_of(program.node("mul_4"))] == ["linear_8", "unsqueeze_3"]
    assert [str(n) for n in args_of(program.node("add_5"))] == ["mul_4", "add_4", "1"]
    assert all(epilogue(program, n.name)[1] is None for n in products(program))
    # All else is as it is with gates.
    gated = apply("fuse-epilogues", old)
    assert [n.name for n in products(gated)] == [n.name.replace("linear_8", "add_5") for n in products(program)]
    for name in ("silu", "add_2", "add_3", "mul_3", "gelu_1"):
        assert epilogue(program, name) == epilogue(gated, name)
    round_trip(its, program)


def test_adaln_gates_of_one_entry_each(subject: Subjects) -> None:
    its = subject("dit")
    program = apply("fuse-epilogues", before("fuse-epilogues", its))
    gated = [n for n in find(program, "tfqc.qlinear") if args_of(n)[8] is not None]
    assert len(gated) == 4 and all(args_of(n)[9] is not None for n in gated)
    assert not find(program, "aten.mul")
    round_trip(its, program)


class Kept(nn.Module):
    """What looks like endings, and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, 16)
        self.twice, self.image = nn.Linear(16, 16), nn.Conv2d(16, 16, 1)
        self.tanh, self.odd, self.across = nn.Linear(16, 32), nn.Linear(16, 24), nn.Linear(16, 16)
        self.narrow, self.broad, self.scaled, self.late = nn.Linear(12, 16), *(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = x + self.time(time.float()[:, None] / 1000)[:, None]
        twice = self.twice(x)
        x = F.silu(twice) - twice
        value, gate = self.tanh(x).chunk(2, dim=-1)
        x = value * F.gelu(gate, approximate="tanh")
        value, gate = self.odd(x).chunk(2, dim=-1)  # 12 columns: no whole blocks of 16
        x = self.narrow(value * F.gelu(gate))
        first, second = self.across(x).chunk(2, dim=1)
        x = F.pad(first * F.gelu(second), (0, 0, 0, 4))
        x = self.broad(x) + x[:, :1]
        x = self.scaled(x) * 2.0
        image = self.image(x.transpose(1, 2).unflatten(2, (2, 4))) * x[:, :1, :, None].transpose(1, 2)
        return torch.tanh(self.late(image.flatten(2).transpose(1, 2)).add(x, alpha=2))


KEPT = example(Kept, 8, 16)


def test_unchanged() -> None:
    old = before("fuse-epilogues", of_example("kept", KEPT))
    assert len(find(old, "tfqc.qlinear")) == 8
    assert render(apply("fuse-epilogues", old)) == render(old)


def test_nothing_behind_a_sum() -> None:
    """An activation of a residual sum, and a gate on one, are no part of the product's ending."""
    its = of_example("behind-a-sum", BEHIND)
    program = apply("fuse-epilogues", before("fuse-epilogues", its))
    assert [args_of(n)[9] is not None for n in find(program, "tfqc.qlinear")] == [True, True]
    assert len(find(program, "aten.silu")) == len(find(program, "aten.mul")) == 1
    round_trip(its, program)


class Behind(nn.Module):
    """Sums first."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.one, self.two = nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        when = self.time(time.float()[:, None] / 1000)[:, None]
        x = F.silu(self.one(x) + x)
        return (self.two(x) + x) * when


BEHIND = example(Behind, 8, 16)


def test_refused() -> None:
    with pytest.raises(PipelineError, match="needs stage lowered"):
        parts().run("fuse-epilogues")
