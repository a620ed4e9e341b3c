"""Uniform affine quantization: grids, weights and activation ranges.

Everything here is plain torch and follows one numeric contract, that of
`torch.fake_quantize_per_tensor_affine` and oneDNN:

    q = clamp(round_half_even(x * (1 / s)) + z, qmin, qmax)        x^ = (q - z) * s

with the reciprocal taken in float32. Multiplying by it is not the same as dividing by s: the two differ on
rounding ties, so no code may divide. Weights are seen as matrices [O, K]: output channels times everything
else, flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tfqc.errors import CalibrationError, TfqcError

RangeMethod = Literal["min-max", "mse"]

# The search of BRECQ, Q-Diffusion and TFMQ-DM: 80 ranges, 1.00 down to 0.21 of min-max, by |error|^2.4.
SHRINK_STEPS = 80
SHRINK_STEP = 0.01
ERROR_POWER = 2.4

_SEARCH_CHUNK = 1 << 18  # elements searched at once: temporaries of 1 MiB, bounded and in cache
_MIN_SCALE = torch.finfo(torch.float32).tiny  # both it and its reciprocal are normal float32 numbers
_MAX_RANGE = 2.0**120  # beyond this, scales have denormal reciprocals and dequantized values overflow


@dataclass(frozen=True)
class Grid:
    """The integers to round to: symmetric is two's complement with zero point 0, else 0 .. 2^bits - 1.

    top: the highest code of a grid that is not symmetric, where those above stay unused; 0 = 2^bits - 1.
    """

    bits: int
    symmetric: bool
    top: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise TfqcError(f"a grid has 2 to 8 bits, not {self.bits}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        if self.symmetric:
            return (1 << (self.bits - 1)) - 1
        return self.top or (1 << self.bits) - 1

    @property
    def storage_shift(self) -> int:
        """Added to a code to store it as int8: -128 for asymmetric 8 bits, the one grid that does not fit."""
        return -128 if self.qmax > 127 else 0


def range_to_qparams(lo: Tensor, hi: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale (float32, normal) and zero point (int32) of the ranges [lo, hi], elementwise.

    The range is first widened to contain 0, so 0 is always exact. A range that is only 0 gets scale 1: any
    scale would do, and 1 cannot underflow when backends multiply scales. `lo` falls on qmin exactly and `hi`
    within half a step of qmax.

    Raises TfqcError for ends that are NaN, infinite, larger than 2^120, or out of order.
    """
    if lo.shape != hi.shape:
        raise TfqcError(f"a range needs ends of one shape, not {list(lo.shape)} and {list(hi.shape)}")
    if not bool(((lo.abs() <= _MAX_RANGE) & (hi.abs() <= _MAX_RANGE)).all()):  # also false for NaN
        raise CalibrationError("a range to quantize ends in NaN, infinity or beyond 2**120: check its data")
    if not bool((lo <= hi).all()):
        raise TfqcError("a range to quantize has its lower end above its upper end")
    low, high = lo.float().clamp(max=0), hi.float().clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(low.double() / grid.qmin, high.double() / grid.qmax)
    else:
        scale = (high.double() - low.double()) / grid.qmax
    scale = torch.where(scale > 0, scale.clamp(min=_MIN_SCALE), 1.0).float()
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    return scale, (low * scale.reciprocal()).round().neg().clamp(grid.qmin, grid.qmax).int()


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes (int32) of `x`; scale and zero point broadcast to it. Infinity saturates; NaN has no code."""
    return ((x.float() * scale.reciprocal()).round() + zero_point).clamp(grid.qmin, grid.qmax).int()


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Values (float32) of codes: (q - z) * s."""
    return (q.int() - zero_point) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """`dequantize(quantize(x))`, bit for bit, but differentiable by the straight-through estimator.

    The gradient to `x` is 1 inside the grid's range and 0 outside; the gradient to `scale` is that of LSQ
    (arXiv 1902.08153).
    """
    # Clamping before rounding gives the same integers (the bounds are integers) and the gradient we want.
    steps = (x.float() * scale.reciprocal()).clamp(grid.qmin - zero_point, grid.qmax - zero_point)
    # round(v) - v is exact (Sterbenz), so adding v back yields round(v) itself.
    return (steps + (steps.round() - steps).detach()) * scale


def expand_groups(per_group: Tensor, shape: Sequence[int], group: int | None) -> Tensor:
    """Spreads `per_group` [O, G] over a weight of `shape` [O, ...], each over `group` columns of [O, K].

    Per channel (G = 1) the result is a view, otherwise a copy. Raises TfqcError if G does not fit.
    """
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    groups = 1 if group is None else -(-columns // group)
    if tuple(per_group.shape) != (rows, groups):
        raise TfqcError(
            f"a weight of shape {list(shape)} in groups of {group} has {[rows, groups]} parameters, "
            f"not {list(per_group.shape)}"
        )
    if groups == 1:
        return per_group.view(rows, *[1] * (len(shape) - 1)).expand(*shape)
    assert group is not None
    return per_group.repeat_interleave(group, dim=1)[:, :columns].reshape(*shape)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight as codes and parameters.

    q: int8 in the shape of the weight, code + grid.storage_shift (so asymmetric 8-bit codes 0..255 are stored
    as -128..127).
    scale, zero_point: float32 and int32, both [O, G]. The zero point belongs to the unshifted code.
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    grid: Grid
    group: int | None

    @staticmethod
    def from_codes(
        codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, group: int | None
    ) -> "QuantizedWeight":
        """Wraps unshifted integer codes within the grid, in the shape of the weight."""
        return QuantizedWeight((codes + grid.storage_shift).to(torch.int8), scale, zero_point, grid, group)

    def codes(self) -> Tensor:
        """Unshifted codes, int32, in the shape of the weight."""
        return self.q.int() - self.grid.storage_shift

    def dequantize(self) -> Tensor:
        """The weight the codes stand for, float32."""
        scale = expand_groups(self.scale, self.q.shape, self.group)
        return dequantize(self.codes(), scale, expand_groups(self.zero_point, self.q.shape, self.group))


def without_values(w: Tensor, grid: Grid, group: int | None) -> QuantizedWeight:
    """What quantizing a weight would give, as far as that is known without its values: meta codes, and parameters that
    stand for others: scales 1, and zero points that are 0 on symmetric grids alone."""
    columns = w[0].numel()
    shape = (w.shape[0], -(-columns // min(group or columns, columns)))
    codes = torch.empty(w.shape, dtype=torch.int8, device="meta")
    zero_point = torch.full(shape, 0 if grid.symmetric else 1, dtype=torch.int32)
    return QuantizedWeight(codes, torch.ones(shape), zero_point, grid, group)


def quantize_weight(
    w: Tensor, grid: Grid, method: RangeMethod = "min-max", group: int | None = None
) -> QuantizedWeight:
    """Quantizes a weight [O, ...] to nearest, one range per output channel or per `group` columns of [O, K].

    The last group may be shorter. Raises TfqcError for vectors, empty weights, NaN and infinity.
    """
    if w.ndim < 2 or w.numel() == 0:
        raise TfqcError(f"a weight to quantize is at least two-dimensional and not empty, not {list(w.shape)}")
    if group is not None and group < 1:
        raise TfqcError(f"a weight group has at least one column, not {group}")
    matrix = w.detach().float().flatten(1)
    # A short last group is padded with zeros: exact in every range, so they change no result.
    width = min(group or matrix.shape[1], matrix.shape[1])
    groups = -(-matrix.shape[1] // width)
    rows = torch.nn.functional.pad(matrix, (0, groups * width - matrix.shape[1])).reshape(-1, width)
    lo, hi = rows.amin(1), rows.amax(1)
    if method == "mse":
        lo, hi = _search_ranges(rows, lo, hi, grid)
    scale, zero_point = (p.view(-1, groups) for p in range_to_qparams(lo, hi, grid))
    wide_scale, wide_zero = (expand_groups(p, w.shape, group) for p in (scale, zero_point))
    codes = quantize(w.detach(), wide_scale, wide_zero, grid)
    return QuantizedWeight.from_codes(codes, scale, zero_point, grid, group)


class RangeStats:
    """Running minimum and maximum of a tensor seen in pieces, and optionally a bounded sample of its values.

    The sample is uniform over everything seen: each value draws a random key and the `capacity` smallest keys
    stay. A strided sample would be cheaper, but strides that meet channel counts see a few channels only.
    Equal pieces in equal order give an equal sample: the generator is seeded and private.

    Attributes:
        lo, hi: f32 scalars, inf and -inf before anything is seen.
        values, keys: the sample, f32, and the keys that it was drawn with, f64, smallest first.
    """

    def __init__(self, capacity: int = 0, seed: int = 0) -> None:
        self.lo, self.hi = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        self.values, self.keys = torch.empty(0), torch.empty(0, dtype=torch.float64)
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, x: Tensor) -> None:
        """Takes in a tensor of any shape and floating dtype. Raises TfqcError if it holds NaN or infinity."""
        if x.numel() == 0:
            return
        flat = x.detach().flatten()
        lo, hi = (end.float().cpu() for end in torch.aminmax(flat))
        if not bool(torch.isfinite(lo) & torch.isfinite(hi)):
            raise CalibrationError("calibration met NaN or infinity: the model or its inputs are broken there")
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        if self.capacity:
            keys = torch.rand(flat.numel(), dtype=torch.float64, generator=self._generator)
            if self.keys.numel() == self.capacity:  # full: only smaller keys can enter, soon very few
                entering = (keys < self.keys.max()).nonzero().flatten()
                flat, keys = flat[entering.to(flat.device)], keys[entering]
            self._keep(flat.float().cpu(), keys)

    def merge(self, other: "RangeStats") -> None:
        """Takes in what another has seen; their seeds differ."""
        self.lo, self.hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)
        if self.capacity:
            self._keep(other.values, other.keys)

    def _keep(self, values: Tensor, keys: Tensor) -> None:
        """The values with the smallest keys, in their order, of those there are and these."""
        values, keys = torch.cat([self.values, values]), torch.cat([self.keys, keys])
        self.keys, kept = keys.topk(min(self.capacity, keys.numel()), largest=False)
        self.values = values[kept]


def activation_range(stats: RangeStats, grid: Grid, method: RangeMethod = "min-max") -> tuple[Tensor, Tensor]:
    """The range (lo, hi), two float32 scalars, to quantize an activation with; "mse" needs a kept sample."""
    if bool(stats.lo > stats.hi):
        raise CalibrationError("an activation has no range: calibration never reached it")
    if method == "min-max":
        return stats.lo, stats.hi
    if stats.values.numel() == 0:
        raise TfqcError('method "mse" needs a sample of values: collect RangeStats with a capacity')
    lo, hi = _search_ranges(stats.values[None], stats.lo[None], stats.hi[None], grid)
    return lo[0], hi[0]


def _search_ranges(rows: Tensor, lo: Tensor, hi: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """For each row of `rows` [R, L], the part of [lo, hi] (both [R]) with the least sum of |error|^2.4."""
    share = torch.ones_like(lo)
    size = max(1, _SEARCH_CHUNK // rows.shape[1])
    for begin in range(0, rows.shape[0], size):
        part = slice(begin, begin + size)
        x, low, high = rows[part].float(), lo[part, None], hi[part, None]
        error = torch.empty_like(x)
        # Errors relative to the range: |error|^2.4 of small weights underflows, and all ranges look perfect.
        unit = torch.maximum(low.abs(), high.abs()).clamp(min=_MIN_SCALE).reciprocal()
        least = torch.full_like(lo[part], torch.inf)
        every = torch.tensor([1 - step * SHRINK_STEP for step in range(SHRINK_STEPS)], device=x.device)
        scales, zero_points = range_to_qparams(low * every[:, None, None], high * every[:, None, None], grid)
        for kept, scale, zero_point in zip(every, scales, zero_points, strict=True):
            # `fake_quantize`, bit for bit, in one buffer.
            torch.mul(x, scale.reciprocal(), out=error).clamp_(grid.qmin - zero_point, grid.qmax - zero_point)
            total = error.round_().mul_(scale).sub_(x).mul_(unit).abs_().pow_(ERROR_POWER).sum(1)
            better = total < least  # strictly: ties keep the wider range
            least = torch.where(better, total, least)
            share[part] = torch.where(better, kept, share[part])
    return lo * share, hi * share
