"""Some of the rows that a linear or a convolution multiplies its weight by, at each step of the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tfqc.calibration.observers.base import Observer, State
from tfqc.calibration.observers.moments import steps_looked_at, windows_of
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program

VALUES = 1 << 15  # kept of each step: so many rows of how many columns there are
LEAST_ROWS = 8
_BATCH = 1_000_003  # apart in seeds, as in `Ranges`


@dataclass(frozen=True)
class SampledRows:
    """Rows [R, K] f32 by the position of their step, and the least and the greatest of all values that were seen."""

    rows: dict[int, Tensor]
    low: float
    high: float


class Samples(Observer[SampledRows]):
    """Rows of K values at some steps, drawn alike from all places and batches: a linear's inputs, or windows of an
    ungrouped 2-d convolution.

    Args:
        columns, kernel, geometry: as in `Moments`.
        steps: positions in the schedule.
        batch: its number, by which rows are drawn.
    """

    kind: ClassVar[str] = "samples"

    def __init__(
        self,
        columns: int,
        kernel: tuple[int, ...],
        geometry: tuple[tuple[int, int], ...],
        steps: frozenset[int],
        batch: int = 0,
    ) -> None:
        self._columns, self._kernel, self._geometry, self._batch = columns, kernel, geometry, batch
        self.steps = steps
        self._most = max(VALUES // columns, LEAST_ROWS)
        self._rows: dict[int, Tensor] = {}
        self._keys: dict[int, Tensor] = {}  # rows with the smallest stay
        self._ends = torch.tensor([torch.inf, -torch.inf])
        self._generators: dict[int, torch.Generator] = {}

    @classmethod
    def of(cls, program: Program, node: fx.Node, count: int, looks: int) -> Samples:
        """For the input of a linear or convolution (`has_moments`), at `looks` of `count` steps, evenly spread."""
        return cls(*windows_of(program, node), steps_looked_at(count, looks))

    def options(self) -> dict[str, Any]:
        return {
            "columns": self._columns,
            "kernel": self._kernel,
            "geometry": self._geometry,
            "steps": sorted(self.steps or ()),
        }

    def fresh(self, batch: int) -> Self:
        return type(self)(self._columns, self._kernel, self._geometry, self.steps or frozenset(), batch)

    def update(self, value: Tensor, step: int) -> None:
        value = value.detach()
        ends = torch.stack(torch.aminmax(value)).float().cpu()
        if not bool(torch.isfinite(ends).all()):
            raise CalibrationError("calibration met NaN or infinity: the model or its inputs are broken there")
        self._ends = torch.stack([torch.minimum(self._ends[0], ends[0]), torch.maximum(self._ends[1], ends[1])])
        generator = self._generators.setdefault(step, torch.Generator().manual_seed(step + self._batch * _BATCH))
        places = self._windows(value) if self._kernel else value.reshape(-1, self._columns)
        shape = places.shape[: 3 if self._kernel else 1]
        keys, chosen = torch.rand(shape.numel(), dtype=torch.float64, generator=generator).topk(
            min(self._most, shape.numel()), largest=False
        )
        rows = places[torch.unravel_index(chosen.to(value.device), shape)].reshape(len(chosen), -1)
        self._keep(step, rows.float().cpu(), keys)

    def _windows(self, value: Tensor) -> Tensor:
        """A view of all windows of [N, C, H, W] by image and place: [N, high, wide, C, *kernel]."""
        stride, padding, dilation = self._geometry
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, self._kernel, strict=True)]
        padded = F.pad(value, (padding[1], padding[1], padding[0], padding[0]))
        views = padded.unfold(2, reach[0], stride[0]).unfold(3, reach[1], stride[1])
        return views[..., :: dilation[0], :: dilation[1]].permute(0, 2, 3, 1, 4, 5)

    def _keep(self, step: int, rows: Tensor, keys: Tensor) -> None:
        if step in self._rows:
            rows, keys = torch.cat([self._rows[step], rows]), torch.cat([self._keys[step], keys])
        self._keys[step], kept = keys.topk(min(self._most, len(keys)), largest=False)
        self._rows[step] = rows[kept]

    def merge(self, other: Observer[Any]) -> None:
        assert isinstance(other, Samples)
        for step, rows in other._rows.items():
            self._keep(step, rows, other._keys[step])
        low, high = torch.minimum(self._ends, other._ends)[0], torch.maximum(self._ends, other._ends)[1]
        self._ends = torch.stack([low, high])

    def finish(self) -> SampledRows:
        return SampledRows(dict(sorted(self._rows.items())), float(self._ends[0]), float(self._ends[1]))

    def unknown(self) -> SampledRows:
        return SampledRows({}, -1.0, 1.0)

    def state(self) -> State:
        kept = {f"rows.{step}": rows for step, rows in self._rows.items()}
        return State({**kept, **{f"keys.{s}": k for s, k in self._keys.items()}, "ends": self._ends}, self.options())

    @classmethod
    def from_state(cls, state: State) -> Self:
        facts = state.facts
        geometry = tuple((g[0], g[1]) for g in facts["geometry"])
        found = cls(facts["columns"], tuple(facts["kernel"]), geometry, frozenset(facts["steps"]))
        for name, tensor in state.tensors.items():
            kind, _, step = name.partition(".")
            if kind == "ends":
                found._ends = tensor
            else:
                (found._rows if kind == "rows" else found._keys)[int(step)] = tensor
        return found
