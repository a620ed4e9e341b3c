"""Learned steps quantize as the steps that they start from, and their gradients are LSQ's."""

from __future__ import annotations

import pytest
import torch

from tfqc.quant.grid import Grid, fake_quantize
from tfqc.quant.learned_steps import LearnedSteps

GRID = Grid(4, symmetric=False)


@pytest.mark.parametrize("rows", [1, 3])
def test_they_start_as_they_were(rows: int) -> None:
    torch.manual_seed(0)
    x, steps = torch.randn(5, 2, 4), torch.tensor([0, 2, 1, 2, 0])
    scale, zero_point = torch.rand(rows) + 0.1, torch.randint(3, 9, (rows,), dtype=torch.int32)
    made = LearnedSteps(scale, zero_point, GRID)(x, steps)
    own = torch.zeros_like(steps) if rows == 1 else steps
    wanted = fake_quantize(x, scale[own][:, None, None], zero_point[own][:, None, None], GRID)
    assert torch.equal(made, wanted)


def test_gradients() -> None:
    """Of the scale: x̂/s - x/s inside of the range, its end outside; of the input: 1 and 0."""
    x = torch.tensor([[0.26], [-0.9], [7.0], [-3.0]], requires_grad=True)
    its = LearnedSteps(torch.tensor([0.5]), torch.tensor([4], dtype=torch.int32), GRID)
    its(x, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and x.grad.flatten().tolist() == [1, 1, 0, 0]
    inside = [1 - 0.52, -2 + 1.8]
    by_scale = sum([*inside, 15 - 4, 0 - 4])
    assert its.theta.grad is not None and float(its.theta.grad) == pytest.approx(0.5 * by_scale, rel=1e-5)


def test_protected_steps_stay_as_they_are() -> None:
    x = torch.randn(3, 4)
    its = LearnedSteps(torch.tensor([0.5]), torch.tensor([4], dtype=torch.int32), GRID, torch.tensor([[True], [False]]))
    made = its(x, torch.tensor([0, 1, 0]))
    assert torch.equal(made[[0, 2]], x[[0, 2]]) and not torch.equal(made[1], x[1])
