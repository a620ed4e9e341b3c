import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.errors import CalibrationError, TfqcError
from tfqc.quant.adaround import SoftRounding, beta_at, reconstruct
from tfqc.quant.grid import Grid, expand_groups, quantize_weight

grids = st.builds(Grid, st.integers(2, 8), st.booleans())
groups = st.sampled_from([None, 4])
methods = st.sampled_from(["min-max", "mse"])


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding_of(w, grid, method="min-max", group=None):
    nearest = quantize_weight(w, grid, method, group)
    return SoftRounding(w, nearest.scale, nearest.zero_point, grid, group), nearest


def linear_problem(seed=0):
    """A Linear with correlated inputs, as the rows of a time embedding are, so that errors can cancel."""
    x = randn(seed, 24, 6) @ randn(seed + 1, 6, 32)
    w = randn(seed + 2, 16, 32)
    return x, w, x @ w.T


@settings(max_examples=40, deadline=None)
@given(grids, groups, methods, st.integers(0, 1000))
def test_starts_at_the_weight_inside_the_range(grid, group, method, seed):
    w = randn(seed, 3, 2, 5)
    rounding, nearest = rounding_of(w, grid, method, group)
    scale, zero_point = (expand_groups(p, w.shape, group) for p in (nearest.scale, nearest.zero_point))
    inside = w.clamp((grid.qmin - zero_point) * scale, (grid.qmax - zero_point) * scale)
    assert torch.allclose(rounding.soft(), inside, rtol=1e-5, atol=1e-5)
    # Untrained, hard rounding is rounding to nearest.
    assert torch.equal(rounding.hard().q, nearest.q)


@settings(max_examples=40, deadline=None)
@given(grids, groups, methods, st.integers(0, 1000))
def test_hard_rounding_moves_by_at_most_one_step(grid, group, method, seed):
    w = randn(seed, 3, 2, 5)
    rounding, nearest = rounding_of(w, grid, method, group)
    with torch.no_grad():
        rounding.alpha.copy_(randn(seed + 1, *w.shape))
    hard = rounding.hard()
    scale, zero_point = (expand_groups(p, w.shape, group) for p in (nearest.scale, nearest.zero_point))
    down = (w * scale.reciprocal()).floor() + zero_point
    assert torch.equal(hard.codes(), (down + (rounding.alpha >= 0)).clamp(grid.qmin, grid.qmax).int())
    assert ((hard.codes() - nearest.codes()).abs() <= 1).all()
    assert hard.scale is nearest.scale and hard.grid == grid and hard.group == group
    rounding.harden()
    assert torch.equal(rounding.soft(), hard.dequantize())
    assert rounding.regularizer(2.0) == 0


def test_regularizer_is_smallest_at_the_ends():
    rounding, _ = rounding_of(randn(0, 2, 3), Grid(4, True))
    values = []
    for alpha in (0.0, 0.5, 1.0, 2.0, 5.0):
        torch.nn.init.constant_(rounding.alpha, alpha)
        values.append(rounding.regularizer(4.0).item())
    assert values[0] == 6 and values[-1] == 0
    assert values == sorted(values, reverse=True)


def test_beta_schedule():
    assert [beta_at(p) for p in (0.0, 0.1, 0.2)] == [20, 20, 20]
    assert beta_at(0.6) == pytest.approx(11) and beta_at(1.0) == 2
    assert beta_at(0.75, warmup=0.5, start=8, end=4) == 6


@pytest.mark.parametrize("group", [None, 8])
def test_beats_rounding_to_nearest(group):
    x, w, target = linear_problem()
    rounding, nearest = rounding_of(w, Grid(4, True), group=group)
    seen = []
    got = reconstruct(
        [rounding],
        lambda: (x @ rounding.soft().T - target).square().mean(),
        iterations=300,
        on_iteration=lambda i, value: seen.append((i, value)),
    )
    plain = (x @ nearest.dequantize().T - target).square().mean()
    hard = (x @ rounding.hard().dequantize().T - target).square().mean()
    assert got == hard.item() < 0.5 * plain
    assert [i for i, _ in seen] == list(range(300)) and seen[0][1] < 1e-6


def test_trains_the_alphas_together_and_nothing_else():
    x, w, _ = linear_problem()
    layers = [w, randn(5, 8, 16)]
    bias = torch.zeros(16, requires_grad=True)
    target = torch.relu(x @ layers[0].T) @ layers[1].T

    def run():
        pairs = [rounding_of(layer, Grid(3, True)) for layer in layers]
        first, second = (rounding for rounding, _ in pairs)

        def loss():
            return (torch.relu(x @ first.soft().T + bias) @ second.soft().T - target).square().mean()

        value = reconstruct([first, second], loss, iterations=100)
        moved = [not torch.equal(r.hard().q, nearest.q) for r, nearest in pairs]
        return value, moved, first.hard().q, second.hard().q

    one, other = run(), run()
    assert one[0] == other[0] and torch.equal(one[2], other[2]) and torch.equal(one[3], other[3])
    assert one[1] == [True, True]
    assert bias.grad is None and not bias.any()


def test_rounds_even_where_the_loss_is_indifferent():
    """The regulariser alone drives alphas to 0 or 1: here before harden() would have to."""
    rounding, _ = rounding_of(randn(0, 4, 8), Grid(4, True))
    left = []
    reconstruct(
        [rounding],
        lambda: rounding.soft().sum() * 0,
        iterations=600,
        weight=1.0,
        on_iteration=lambda i, _: left.append(rounding.regularizer(2.0).item()),
    )
    assert left[-1] < 0.1 * left[0] and left[0] == pytest.approx(left[110])  # nothing in the warm-up


def test_broken_losses_are_refused():
    rounding, _ = rounding_of(randn(0, 4, 8), Grid(4, True))
    unread, _ = rounding_of(randn(1, 4, 8), Grid(4, True))
    with pytest.raises(TfqcError, match=r"rounding #1"):
        reconstruct([rounding, unread], lambda: rounding.soft().sum(), iterations=1)
    with pytest.raises(TfqcError, match=r"rounding #0"):
        reconstruct([rounding], lambda: torch.zeros(()), iterations=1)
    with pytest.raises(CalibrationError, match="nan at iteration 0"):
        reconstruct([rounding], lambda: rounding.soft().sum() * torch.nan, iterations=1)
