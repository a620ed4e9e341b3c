"""Second moments H = E[x xᵀ] of what a linear or a convolution multiplies its weight by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tfqc.analysis.weighted import weight_of
from tfqc.calibration.observers.base import Observer, State
from tfqc.ir.program import Program
from tfqc.ir.views import Conv, Linear

TILE = 1 << 22  # values of a convolution's windows that are laid out at once: 16 MiB
STRIP = 256  # rows of H that one product gives; what is left of them in H is their mirror


class Moments(Observer[Tensor]):
    """H [K, K] in f64 of rows x of K values: a linear's inputs, or the windows of an ungrouped 2-d convolution.

    Products of one batch at one step are f32, their sums f64, in the order of steps and then of batches. Windows are
    laid out in tiles, so an update needs `TILE` values and `STRIP` rows of H beside the value and H.

    Args:
        kernel: [height, width] of a convolution's windows, in the order of its flattened weight; empty for a linear.
        geometry: its stride, padding and dilation, [height, width] each.
        columns: K.
        steps: positions in the schedule; None is all of them.
    """

    kind: ClassVar[str] = "moments"

    def __init__(
        self,
        columns: int,
        kernel: tuple[int, ...] = (),
        geometry: tuple[tuple[int, int], ...] = (),
        steps: frozenset[int] | None = None,
    ) -> None:
        self._columns, self._kernel, self._geometry, self.steps = columns, kernel, geometry, steps
        self._sum = torch.zeros(0, 0, dtype=torch.float64)  # made when the first value comes
        self._rows = 0

    @classmethod
    def of(cls, program: Program, node: fx.Node, count: int, looks: int) -> Moments:
        """For the input of a linear or convolution (`has_moments`), at `looks` of `count` steps, evenly spread."""
        return cls(*windows_of(program, node), steps_looked_at(count, looks))

    def options(self) -> dict[str, Any]:
        steps = None if self.steps is None else sorted(self.steps)
        return {"columns": self._columns, "kernel": self._kernel, "geometry": self._geometry, "steps": steps}

    def fresh(self, batch: int) -> Self:
        del batch
        return type(self)(self._columns, self._kernel, self._geometry, self.steps)

    def update(self, value: Tensor, step: int) -> None:
        del step
        value = value.detach()
        if not len(self._sum):
            self._sum = torch.zeros(self._columns, self._columns, dtype=torch.float64)
        tiles = self._windows(value) if self._kernel else iter([value.reshape(-1, self._columns).T])
        for tile in tiles:
            for begin in range(0, self._columns, STRIP):
                end = min(begin + STRIP, self._columns)
                self._sum[begin:end, begin:] += tile[begin:end] @ tile[begin:].T
            self._rows += tile.shape[1]

    def _windows(self, value: Tensor) -> Iterator[Tensor]:
        """All windows of [N, C, H, W] as columns [K, rows], in tiles."""
        stride, padding, dilation = self._geometry
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, self._kernel, strict=True)]
        high, wide = ((s + 2 * p - r) // step + 1 for s, p, r, step in
                      zip(value.shape[2:], padding, reach, stride, strict=True))  # fmt: skip
        images = max(1, TILE // (self._columns * high * wide))
        lines = max(1, TILE // (self._columns * wide))
        for part in value.split(images):
            padded = F.pad(part, (padding[1], padding[1], padding[0], padding[0]))
            views = padded.unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])
            views = views[..., :: dilation[0], :: dilation[1]]
            for tile in views.split(lines, dim=2):  # one piece, where several images fit
                yield tile.permute(1, 4, 5, 0, 2, 3).reshape(self._columns, -1)

    def merge(self, other: Observer[Any]) -> None:
        assert isinstance(other, Moments)
        if len(self._sum) and len(other._sum):
            self._sum += other._sum
        elif len(other._sum):
            self._sum = other._sum.clone()
        self._rows += other._rows

    def finish(self) -> Tensor:
        result = self._sum / max(self._rows, 1)
        for begin in range(0, self._columns, STRIP):
            end = begin + STRIP
            result[end:, begin:end] = result[begin:end, end:].T
        return result

    def unknown(self) -> Tensor:
        return torch.empty(self._columns, self._columns, dtype=torch.float64, device="meta")

    def state(self) -> State:
        return State({"sum": self._sum}, {**self.options(), "rows": self._rows})

    @classmethod
    def from_state(cls, state: State) -> Self:
        facts = state.facts
        steps = None if facts["steps"] is None else frozenset(facts["steps"])
        geometry = tuple((g[0], g[1]) for g in facts["geometry"])
        found = cls(facts["columns"], tuple(facts["kernel"]), geometry, steps)
        found._sum, found._rows = state.tensors["sum"], facts["rows"]
        return found


def windows_of(program: Program, node: fx.Node) -> tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Columns, kernel and geometry, as `Moments` has them, of a linear or convolution (`has_moments`)."""
    shape = program.tensors[weight_of(node) or ""].shape
    conv = Conv.of(node)
    if conv is None:
        return shape[1:].numel(), (), ()
    geometry = (conv.stride, conv.padding, conv.dilation)
    return shape[1:].numel(), tuple(shape[2:]), tuple((g[0], g[-1]) for g in geometry)


def steps_looked_at(count: int, looks: int) -> frozenset[int]:
    """`looks` of `count` steps, evenly spread; all, where there are fewer."""
    looks = min(looks, count)
    return frozenset(round(i * (count - 1) / max(looks - 1, 1)) for i in range(looks))


def has_moments(node: fx.Node) -> bool:
    """True for linears and ungrouped 2-d convolutions, whose inputs are rows of K values."""
    if weight_of(node) is None:
        return False
    conv = Conv.of(node)
    whole = conv is not None and conv.target is torch.ops.aten.conv2d.default and conv.groups == 1
    return Linear.of(node) is not None or whole
