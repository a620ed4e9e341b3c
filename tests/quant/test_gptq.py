"""GPTQ: on the grid, better than rounding to nearest in the error it minimises, and equal to it where it must be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.errors import CalibrationError
from tfqc.quant.gptq import DAMPING, gptq
from tfqc.quant.grid import Grid, dequantize, expand_groups, quantize, quantize_weight


def layer(seed: int, outputs: int = 12, inputs: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and correlated inputs whose mean is not zero, as behind a SiLU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return weight, torch.nn.functional.silu(torch.randn(500, inputs, generator=generator) @ mixing)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(3, 5), st.booleans(), st.sampled_from([None, 7, 16]))
def test_beats_rounding_to_nearest(seed: int, bits: int, symmetric: bool, group: int | None) -> None:
    weight, x = layer(seed)
    nearest = quantize_weight(weight, Grid(bits, symmetric), "mse", group)
    better = gptq(weight, x.T @ x / len(x), nearest)
    codes = better.codes()
    assert codes.min() >= nearest.grid.qmin and codes.max() <= nearest.grid.qmax
    assert torch.equal(better.scale, nearest.scale) and torch.equal(better.zero_point, nearest.zero_point)

    def error(q: torch.Tensor) -> float:
        return float(((weight - q) @ x.T).square().sum())

    assert error(better.dequantize()) < 0.9 * error(nearest.dequantize())


def test_independent_inputs_of_equal_size_round_to_nearest() -> None:
    """With H = 1 no column can make up for another."""
    weight, _ = layer(3)
    nearest = quantize_weight(weight, Grid(4, symmetric=True), "min-max")
    assert torch.equal(gptq(weight, torch.eye(40), nearest).q, nearest.q)


def test_inputs_that_are_never_on() -> None:
    """A dead input has a zero row in H; damping keeps the factorisation alive."""
    weight, x = layer(4)
    x[:, 5] = 0
    assert torch.isfinite(gptq(weight, x.T @ x, quantize_weight(weight, Grid(4, symmetric=True))).dequantize()).all()
    nothing = gptq(weight, torch.zeros(40, 40), quantize_weight(weight, Grid(4, symmetric=True)))
    assert torch.isfinite(nothing.dequantize()).all()


def test_a_convolution_keeps_its_shape() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(200, 36, generator=torch.Generator().manual_seed(1))
    assert gptq(weight, x.T @ x, quantize_weight(weight, Grid(4, symmetric=True))).q.shape == weight.shape


def test_nan_is_refused() -> None:
    weight, x = layer(5)
    with pytest.raises(CalibrationError, match="no finite second moments"):
        gptq(weight, x.T @ x * float("nan"), quantize_weight(weight, Grid(4, symmetric=True)))


@pytest.mark.parametrize(("symmetric", "group", "inputs"), [(True, None, 40), (False, 16, 150), (True, 7, 300)])
def test_it_is_what_the_paper_does(symmetric: bool, group: int | None, inputs: int) -> None:
    """Column by column with the Cholesky factor of the inverse, in its own words."""
    weight, x = layer(7, inputs=inputs)
    h = (x.T @ x / len(x)).double()
    nearest = quantize_weight(weight, Grid(4, symmetric), "mse", group)
    scale, zero_point = (expand_groups(p, weight.shape, group) for p in (nearest.scale, nearest.zero_point))
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(len(h))
    order = damped.diagonal().argsort(descending=True)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    rest, codes = weight.double(), torch.zeros(weight.shape, dtype=torch.int32)
    for k, column in enumerate(order):
        codes[:, column] = quantize(rest[:, column], scale[:, column], zero_point[:, column], nearest.grid)
        rounded = dequantize(codes[:, column], scale[:, column], zero_point[:, column])
        error = (rest[:, column] - rounded) / upper[k, k]
        rest[:, order[k:]] -= error[:, None] * upper[k, k:]
    assert torch.equal(gptq(weight, h, nearest).codes(), codes)
