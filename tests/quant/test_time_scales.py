"""Networks of steps: where they begin, what they give at any time, how they are fitted, and that they train."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tfqc.optim import STQuantAdam
from tfqc.quant.grid import Grid, fake_quantize
from tfqc.quant.scale_fit import RUNGS, Curves, Layer, fit
from tfqc.quant.time_scales import Codes, Networks, eager, rows, steps_at, untrained

TIMES = [951.0, 701.0, 451.0, 201.0, 1.0]


def networks(first: list[float], grids: list[Codes], unit: float = 2.0) -> Networks:
    return untrained(torch.tensor(first), torch.full((len(first),), unit), grids, TIMES, seed=0)


@pytest.mark.parametrize(
    ("bits", "grid", "ends", "codes"),
    [
        (4, "full", (-3.0, 3.0), Codes(15, 8, 8)),  # -8 .. 7
        (4, "released", (-3.0, 3.0), Codes(12, 6, 6)),  # -6 .. 6
        (8, "released", (-3.0, 3.0), Codes(252, 126, 126)),
        (4, "full", (-0.2785, 3.0), Codes(15, 0, 15, 0.2785)),  # SiLU
        (4, "released", (0.0, 3.0), Codes(14, 0, 14)),
        (4, "full", (-0.2, 0.2), Codes(15, 8, 8)),  # little, but as far below as above
    ],
)
def test_codes(bits: int, grid: str, ends: tuple[float, float], codes: Codes) -> None:
    assert Codes.of(bits, grid, *ends) == codes  # type: ignore[arg-type]


def test_untrained_networks_give_one_step() -> None:
    its = networks([0.001, 0.3, 80.0], [Codes(15, 8, 8), Codes(15, 0, 15, 0.25), Codes(15, 8, 8)])
    scale, zero_point = rows(its, [*TIMES, 333.0])
    want = torch.tensor([0.001, 0.3, 80.0])[:, None].expand(3, 6)
    torch.testing.assert_close(scale, want, rtol=1e-5, atol=0)
    assert zero_point.tolist() == [[8] * 6, [1] * 6, [8] * 6]
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32


def trained(its: Networks) -> Networks:
    """With steps that depend on time."""
    drawn = torch.randn(its.w4.shape, generator=torch.Generator().manual_seed(1))
    its.w4.copy_(drawn)
    return its


def test_rows_do_not_depend_on_their_neighbours() -> None:
    its = trained(networks([0.1] * 7, [Codes(15, 0, 15, 0.3)] * 7))
    many = torch.linspace(0, 999, 300).tolist()
    scale, zero_point = rows(its, many)
    alone = [rows(its, [t]) for t in many]
    assert torch.equal(scale, torch.cat([s for s, _ in alone], 1)) and len(scale[0].unique()) > 100
    assert torch.equal(zero_point, torch.cat([z for _, z in alone], 1))
    assert torch.equal(zero_point, (scale.reciprocal() * 0.3).round().clamp(0, 15).int())


def test_curves_are_errors_of_outputs() -> None:
    """At a step of the ladder, what `fake_quantize` does to the product with a weight of fewer bits."""
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    layer = Layer(torch.randn(5, 12), torch.randn(5, 12))
    for codes in (Codes(15, 8, 8), Codes(12, 6, 6), Codes(14, 0, 14, 0.2)):
        curves = Curves.of([[x], [x * 3]], [layer], codes, [False, True])
        assert curves.errors.shape == (2, RUNGS) and not curves.errors[1].any()
        step, error = curves.single()
        rounded = fake_quantize(x, torch.tensor(step), codes.zero_point(torch.tensor(step)), Grid(4, False, codes.top))
        exact = x @ layer.weight.T
        want = (rounded @ layer.quantized.T - exact).square().sum() / exact.square().sum()
        assert error == pytest.approx(float(want) / 2, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adam", "stquant"])
def test_fitted_networks_find_the_valleys(optimizer: str) -> None:
    """Curves whose least lies at another rung at each time; one of them has a single one."""
    best = torch.tensor([[40.0, 35, 30, 25, 20], [12, 12, 12, 12, 12]])
    errors = ((torch.arange(RUNGS) - best[..., None]) / 10).square() + 0.01
    curves = [Curves(-3.0, 0.1, e) for e in errors]
    start = networks([c.single()[0] for c in curves], [Codes(15, 8, 8)] * 2)
    found, after = fit(start, curves, TIMES, iterations=300, learning_rate=0.005, optimizer=optimizer)  # type: ignore[arg-type]
    rung = (rows(found, TIMES)[0].log() + 3) / 0.1
    assert float((rung - best).abs().max()) < 1 and float(after.max()) < 0.02
    assert not any(w.requires_grad for w in found.weights())


@pytest.mark.parametrize("make", [torch.optim.Adam, STQuantAdam])
def test_steps_train_with_the_weights(make: type[torch.optim.Optimizer]) -> None:
    """In training: gradients of a block's output reach weights and networks alike, and rows are what was trained."""
    torch.manual_seed(0)
    grid, codes = Grid(4, False), Codes(15, 8, 8)
    its = networks([1.0], [codes])
    layer, exact = nn.Linear(16, 16), nn.Linear(16, 16).requires_grad_(False)
    layer.load_state_dict(exact.state_dict())
    learned = [weight.requires_grad_() for weight in its.weights()]
    optimizer = make([*learned, *layer.parameters()], lr=0.01)  # type: ignore[call-arg]
    time = torch.tensor(TIMES)

    def loss() -> torch.Tensor:
        x = torch.randn(5, 16) * (0.1 + time / 1000)[:, None]
        step = steps_at(eager, time, its)[0][:, None]
        found = layer(fake_quantize(x, step, codes.zero_point(step.detach()), grid))
        return ((found - exact(x)) / (0.1 + time / 1000)[:, None]).square().mean()

    losses: list[float] = []
    for _ in range(300):
        optimizer.zero_grad()
        (value := loss()).backward()
        optimizer.step()
        losses.append(value.item())
    assert sum(losses[-30:]) < 0.5 * sum(losses[:30])
    frozen = rows(its.map(torch.Tensor.detach), TIMES)[0]
    torch.testing.assert_close(frozen, steps_at(eager, time, its).detach(), rtol=1e-5, atol=0)
    assert float(frozen[0, 0]) > 3 * float(frozen[0, -1])
