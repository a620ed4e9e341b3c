"""Batch norms in eval mode become part of the layer before them, where they alone read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers import run_pass
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.passes.normalize import Normalize


class Normed(nn.Module):
    """A layer, a batch norm of random statistics, and code around them."""

    def __init__(self, layer: nn.Module, norm: nn.Module, code: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.code = layer, norm, code
        for statistic in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            if isinstance(statistic, Tensor):
                statistic.data.uniform_(0.5, 2)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.code(self, x, t)


def behind(self: Any, x: Tensor, t: Tensor) -> Tensor:
    return F.silu(self.norm(self.layer(x))) + t.reshape(-1, *[1] * (x.dim() - 1))


def program_of(model: nn.Module, shape: tuple[int, ...]) -> Program:
    x, t = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 421])
    dtype = next(model.parameters()).dtype
    program = run_pass(capture(model, {"x": x.to(dtype), "t": t}), Normalize())
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    want = model(x.to(dtype), t)
    torch.testing.assert_close(program(x=x.to(dtype), t=t), want, rtol=tolerance, atol=tolerance)
    return program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3, bias=False, groups=2), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
        (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
        (lambda: nn.Conv3d(4, 6, 3), lambda: nn.BatchNorm3d(6), (2, 4, 5, 5, 5)),
        (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (2, 4)),
    ],
)
def test_they_are_part_of_the_layer(layer: Any, norm: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    program = program_of(Normed(layer(), norm(), behind).to(dtype), shape)
    assert "aten.batch_norm" not in render(program) and "running" not in render(program)
    assert {t.dtype for name, t in program.tensors.items() if "normed" in name} == {torch.float32}


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "code"),
    [
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), (2, 4, 5, 5), lambda s, x, t: s.norm(y := s.layer(x)) + y + t[0]),
        (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), (2, 4, 5, 5), lambda s, x, t: s.norm(s.layer(x) + t[0])),
        (nn.Linear(4, 6), nn.BatchNorm1d(3), (2, 3, 4), lambda s, x, t: s.norm(s.layer(x)) + t[0]),
        (nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), (2, 4, 5, 5), lambda s, x, t: s.norm(s.layer(x)) + t[0]),
    ],
    ids=["read twice", "of a sum", "of another dimension", "transposed"],
)
def test_others_stay(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], code: Any) -> None:
    assert "aten.batch_norm" in render(program_of(Normed(layer, norm, code), shape))
