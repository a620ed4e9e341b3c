import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tfqc.errors import CalibrationError, TfqcError
from tfqc.quant import grid as quant
from tfqc.quant.grid import (
    Grid,
    QuantizedWeight,
    RangeStats,
    activation_range,
    dequantize,
    expand_groups,
    fake_quantize,
    quantize,
    quantize_weight,
    range_to_qparams,
)

GRIDS = [Grid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
grids = st.sampled_from(GRIDS)
ends = st.floats(-(2.0**100), 2.0**100, width=32)
seeds = st.integers(0, 2**31)


def sorted_range(a: float, b: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(min(a, b)), torch.tensor(max(a, b))


def spread(lo: torch.Tensor, hi: torch.Tensor, count: int = 301) -> torch.Tensor:
    """Values from `lo` to `hi`, both included, without overflow."""
    t = torch.linspace(0, 1, count)
    return (lo * (1 - t) + hi * t).clamp(lo, hi)


def weight(seed: int, *shape: int) -> torch.Tensor:
    """Normal values with a few outliers, so that shrinking the range pays."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) ** 3


def test_grid_ends():
    assert [(Grid(b, True).qmin, Grid(b, True).qmax) for b in (2, 4, 8)] == [(-2, 1), (-8, 7), (-128, 127)]
    assert [(Grid(b, False).qmin, Grid(b, False).qmax) for b in (2, 4, 8)] == [(0, 3), (0, 15), (0, 255)]
    for bits in (-1, 0, 1, 9):
        with pytest.raises(TfqcError, match="2 to 8 bits"):
            Grid(bits, True)


# Ranges


@settings(deadline=None)
@given(grids, ends, ends)
def test_error_is_at_most_half_a_step_inside_the_range(grid, a, b):
    lo, hi = sorted_range(a, b)
    scale, zero_point = range_to_qparams(lo, hi, grid)
    assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
    assert scale >= torch.finfo(torch.float32).tiny and torch.isfinite(scale.reciprocal())
    assert grid.qmin <= zero_point <= grid.qmax
    x = spread(lo.clamp(max=0), hi.clamp(min=0))
    error = (x - fake_quantize(x, scale, zero_point, grid)).abs().double()
    # Rounding of the scale, of its reciprocal and of their products: some float32 ulps of x.
    assert (error <= scale.double() / 2 + x.abs().double() * 2**-21).all()


@settings(deadline=None)
@given(grids, ends, ends)
def test_range_ends_fall_on_grid_ends(grid, a, b):
    lo, hi = sorted_range(a, b)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale, zero_point = range_to_qparams(lo, hi, grid)
    codes = quantize(torch.stack([lo, hi]), scale, zero_point, grid)
    if hi - lo < 1e-30:
        return  # a scale at its floor spans more than the range
    if grid.symmetric:
        assert zero_point == 0 and (codes[0] == grid.qmin or codes[1] == grid.qmax)
    else:
        assert codes[0] == grid.qmin and codes[1] >= grid.qmax - 1
    assert (codes >= grid.qmin).all() and (codes <= grid.qmax).all()


def test_symmetric_scale_is_the_smallest_that_fits_both_ends():
    lo, hi = torch.tensor([-8.0, -1.0, 2.0, -3.0]), torch.tensor([1.0, 14.0, 7.0, -1.0])
    scale, zero_point = range_to_qparams(lo, hi, Grid(4, True))
    assert scale.tolist() == [1.0, 2.0, 1.0, 0.375] and zero_point.tolist() == [0, 0, 0, 0]


@settings(deadline=None)
@given(grids, st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-116))
def test_constants_survive(grid, value):
    x = torch.tensor(value)
    scale, zero_point = range_to_qparams(x, x, grid)
    assert torch.allclose(fake_quantize(x, scale, zero_point, grid), x, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(grids, st.floats(0, 2.0**-116, width=32))
def test_denormal_ranges_get_a_normal_scale(grid, value):
    scale, _ = range_to_qparams(torch.tensor(-value), torch.tensor(value), grid)
    assert scale >= torch.finfo(torch.float32).tiny
    assert value > 0 or scale == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 2.0**121])
def test_unusable_ranges_are_refused(bad):
    for ends_ in ((bad, 1.0), (0.0, bad)):
        with pytest.raises(CalibrationError, match="NaN, infinity"):
            range_to_qparams(*(torch.tensor([0.0, end]) for end in ends_), Grid(8, False))
    with pytest.raises(TfqcError, match="above"):
        range_to_qparams(torch.tensor(1.0), torch.tensor(0.0), Grid(8, False))
    with pytest.raises(TfqcError, match="one shape"):
        range_to_qparams(torch.zeros(2), torch.ones(3), Grid(8, False))


# The numeric contract


@settings(deadline=None)
@given(grids, st.floats(-(2.0**20), 2.0**20, width=32), st.floats(-(2.0**20), 2.0**20, width=32), seeds)
def test_bit_equal_to_torch(grid, a, b, seed):
    scale, zero_point = range_to_qparams(*sorted_range(a, b), grid)
    # Beyond the range, near zero, and on every rounding tie, where a division would differ.
    ties = (torch.arange(grid.qmin, grid.qmax + 1) - zero_point + 0.5) * scale
    x = torch.cat([weight(seed, 500) * scale * grid.qmax / 4, ties, torch.tensor([0.0, -0.0, 3e38, -3e38])])
    want = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, grid.qmin, grid.qmax)
    got = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))
    fake = fake_quantize(x, scale, zero_point, grid)
    assert torch.equal(fake.view(torch.int32), want.view(torch.int32))


def test_the_reciprocal_is_part_of_the_contract():
    """A case where x / s and x * (1 / s) round differently, so that the test above means something."""
    scale, zero_point, grid = torch.tensor(0.1), torch.tensor(0), Grid(8, False)
    x = torch.arange(256) * scale + scale / 2
    divided = (x / scale).round().clamp(0, 255)
    assert not torch.equal(divided.int(), quantize(x, scale, zero_point, grid))


@settings(deadline=None)
@given(grids, ends, ends)
def test_monotone_and_idempotent(grid, a, b):
    lo, hi = sorted_range(a, b)
    scale, zero_point = range_to_qparams(lo, hi, grid)
    codes = quantize(spread(lo * 1.5, hi * 1.5).sort().values, scale, zero_point, grid)
    assert (codes.diff() >= 0).all()
    every = torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int32)
    assert torch.equal(quantize(dequantize(every, scale, zero_point), scale, zero_point, grid), every)


def test_infinity_saturates():
    x = torch.tensor([-torch.inf, torch.inf])
    assert quantize(x, torch.tensor(0.5), torch.tensor(3), Grid(4, False)).tolist() == [0, 15]
    assert fake_quantize(x, torch.tensor(0.5), torch.tensor(3), Grid(4, False)).tolist() == [-1.5, 6.0]


def test_straight_through_gradients():
    x = torch.tensor([-9.0, -1.3, 0.2, 9.0], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0), Grid(4, True)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0]
    # LSQ: qmin + (round(v) - v) + (round(v) - v) + qmax for v = x / s = -2.6, 0.4
    assert scale.grad is not None and scale.grad.item() == pytest.approx(-8 + (-3 + 2.6) + (0 - 0.4) + 7)


# Weights


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([None, 1, 3, 4, 100]), st.sampled_from(["min-max", "mse"]), seeds)
def test_each_group_is_quantized_as_if_alone(grid, group, method, seed):
    w = weight(seed, 3, 2, 5)  # K = 10: groups of 3 and 4 end in a shorter one
    got = quantize_weight(w, grid, method, group)
    width = group or 10
    groups = -(-10 // width)
    assert got.q.dtype == torch.int8 and got.q.shape == w.shape
    assert got.scale.shape == got.zero_point.shape == (3, groups)
    values = got.dequantize().flatten(1)
    for g in range(groups):
        columns = slice(g * width, (g + 1) * width)
        alone = quantize_weight(w.flatten(1)[:, columns], grid, method)
        assert torch.equal(alone.scale[:, 0], got.scale[:, g])
        assert torch.equal(alone.dequantize(), values[:, columns])


@settings(max_examples=30, deadline=None)
@given(grids, st.sampled_from([None, 4]), seeds)
def test_mse_is_never_worse_than_min_max_in_its_metric(grid, group, seed):
    w = weight(seed, 4, 30)
    error = {}
    for method in ("min-max", "mse"):
        powers = (quantize_weight(w, grid, method, group).dequantize() - w).double().abs() ** 2.4
        rows = torch.nn.functional.pad(powers, (0, 2 if group else 0)).reshape(-1, group or 30)
        error[method] = rows.sum(1)
    assert (error["mse"] <= error["min-max"] * (1 + 1e-5)).all()


def test_mse_gains_at_low_bits_and_at_any_magnitude():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for unit in (1.0, 1e-20, 1e20):
        plain, searched = (
            (quantize_weight(w * unit, Grid(3, True), method).dequantize().double() / unit - w).square().mean()
            for method in ("min-max", "mse")
        )
        assert searched < 0.8 * plain


def test_the_search_does_not_depend_on_its_chunks(monkeypatch):
    w = weight(1, 9, 16)
    whole = quantize_weight(w, Grid(4, False), "mse")
    for chunk in (1, 40):
        monkeypatch.setattr(quant, "_SEARCH_CHUNK", chunk)
        parts = quantize_weight(w, Grid(4, False), "mse")
        assert torch.equal(parts.q, whole.q) and torch.equal(parts.scale, whole.scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_use_the_grid_and_fit_int8(grid):
    stored = quantize_weight(torch.linspace(-1, 1, 600).reshape(2, 300), grid)
    assert stored.codes().min() == grid.qmin and stored.codes().max() == grid.qmax
    assert torch.equal(stored.codes(), stored.q.int() + (128 if grid == Grid(8, False) else 0))
    again = QuantizedWeight.from_codes(stored.codes(), stored.scale, stored.zero_point, grid, None)
    assert torch.equal(again.q, stored.q)


@pytest.mark.parametrize("method", ["min-max", "mse"])
@pytest.mark.parametrize("grid", [Grid(4, True), Grid(8, False)], ids=str)
def test_constant_channels(grid, method):
    w = torch.tensor([0.0, 0.3, -0.7, 1e-12])[:, None].expand(4, 6)
    assert torch.allclose(quantize_weight(w, grid, method).dequantize(), w, rtol=1e-6, atol=0)


def test_weights_that_cannot_be_quantized_are_refused():
    for w in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(TfqcError, match="two-dimensional"):
            quantize_weight(w, Grid(8, True))
    with pytest.raises(TfqcError, match="NaN"):
        quantize_weight(torch.tensor([[1.0, torch.nan]]), Grid(8, True))
    with pytest.raises(TfqcError, match="at least one column"):
        quantize_weight(torch.ones(2, 2), Grid(8, True), group=0)


def test_expand_groups():
    got = expand_groups(torch.tensor([[1, 2], [3, 4]]), (2, 3, 1), 2)
    assert got[:, :, 0].tolist() == [[1, 1, 2], [3, 3, 4]]
    with pytest.raises(TfqcError, match=r"has \[2, 2\] parameters"):
        expand_groups(torch.ones(2, 3), (2, 3), 2)


# Activations


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 50), seeds)
def test_range_stats_see_every_piece(sizes, capacity, seed):
    if not sum(sizes):
        sizes = [1]
    x = weight(seed, sum(sizes))
    stats, twin = RangeStats(capacity), RangeStats(capacity)
    for piece in x.split(sizes):
        stats.update(piece)
        twin.update(piece)
    assert stats.lo == x.min() and stats.hi == x.max()
    assert stats.values.numel() == min(capacity, x.numel())
    assert torch.isin(stats.values, x).all()
    assert torch.equal(stats.values, twin.values)
    assert activation_range(stats, Grid(8, False)) == (stats.lo, stats.hi)


def test_the_sample_is_uniform_over_time_and_channels():
    stats = RangeStats(capacity=2048)
    for step in range(16):  # values tell step and channel; 64 channels would alias with any power-of-two stride
        stats.update((step * 64 + torch.arange(64.0)).expand(32, 64))
    for share in (stats.values // 256, stats.values % 64 // 16):  # four quarters each, 512 samples expected
        counts = torch.bincount(share.int(), minlength=4)
        assert counts.min() > 420 and counts.max() < 604


def test_mse_activation_range_clips_outliers():
    stats = RangeStats(capacity=4096)
    stats.update(torch.randn(4096, generator=torch.Generator().manual_seed(0)))
    stats.update(torch.tensor([20.0, -20.0]))
    grid = Grid(4, False)
    lo, hi = activation_range(stats, grid, "mse")
    assert -20 <= lo < -2 and 2 < hi < 14
    assert activation_range(stats, grid) == (-20, 20)


def test_activations_without_a_usable_range_are_refused():
    stats = RangeStats()
    with pytest.raises(CalibrationError, match="never reached"):
        activation_range(stats, Grid(8, False))
    with pytest.raises(CalibrationError, match="NaN"):
        stats.update(torch.tensor([0.0, torch.nan]))
    stats.update(torch.ones(3))
    with pytest.raises(TfqcError, match="capacity"):
        activation_range(stats, Grid(8, False), "mse")
