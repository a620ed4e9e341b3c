"""Ranges of a value at each step of the schedule, and some of its values where ranges are searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tfqc.calibration.observers.base import Observer, State
from tfqc.quant.grid import Grid, RangeMethod, RangeStats, activation_range, range_to_qparams

SAMPLES = 4096  # values kept of each activation and step, where ranges are searched and not just min-max
_BATCH = 1_000_003  # apart in seeds: steps of one batch are not those of another, and the first has its step's number


@dataclass(frozen=True)
class StepRanges:
    """What was seen of one activation at each step."""

    steps: list[RangeStats]

    def qparams(
        self, grid: Grid, method: RangeMethod, per_step: bool, intervals: int, left_out: Sequence[bool] = ()
    ) -> tuple[Tensor, Tensor]:
        """Scale and zero point, [T] where `per_step` (`intervals` rows repeated, if not 0), else [1].

        left_out: steps that are not looked at where others share their row.
        """
        count = len(self.steps)
        groups = count if intervals == 0 else min(intervals, count)
        owner = [step * groups // count if per_step else 0 for step in range(count)]
        shares = [[i for i in range(count) if owner[i] == g] for g in range(groups if per_step else 1)]
        ranges = [activation_range(_joined(self._looked_at(steps, left_out)), grid, method) for steps in shares]
        lo, hi = (torch.stack([r[end] for r in ranges]) for end in (0, 1))
        scale, zero_point = range_to_qparams(lo, hi, grid)
        return (scale[owner], zero_point[owner]) if per_step else (scale, zero_point)

    def _looked_at(self, steps: list[int], left_out: Sequence[bool]) -> list[RangeStats]:
        wanted = [i for i in steps if not left_out or not left_out[i]]
        return [self.steps[i] for i in wanted or steps]


class Ranges(Observer[StepRanges]):
    """Minimum and maximum at each of `count` steps, and `capacity` values of each, drawn alike from all batches.

    Minimum and maximum are the same for every split into batches. A value that is drawn depends on its batch's number
    and its place in it.
    """

    kind: ClassVar[str] = "ranges"

    def __init__(self, count: int, capacity: int = 0, batch: int = 0) -> None:
        self._count, self._capacity = count, capacity
        self._steps = [RangeStats(capacity, seed=step + batch * _BATCH) for step in range(count)]

    @classmethod
    def for_method(cls, method: RangeMethod, count: int) -> Ranges:
        """With the values that a range search looks at, where there is one."""
        return cls(count, SAMPLES if method == "mse" else 0)

    def options(self) -> dict[str, Any]:
        return {"count": self._count, "capacity": self._capacity}

    def fresh(self, batch: int) -> Self:
        return type(self)(self._count, self._capacity, batch)

    def update(self, value: Tensor, step: int) -> None:
        self._steps[step].update(value)

    def merge(self, other: Observer[Any]) -> None:
        assert isinstance(other, Ranges)
        for own, added in zip(self._steps, other._steps, strict=True):
            own.merge(added)

    def finish(self) -> StepRanges:
        return StepRanges(self._steps)

    def unknown(self) -> StepRanges:
        found = Ranges(self._count, min(self._capacity, 2))
        for step in range(self._count):
            found.update(torch.tensor([-1.0, 1.0]), step)
        return found.finish()

    def state(self) -> State:
        parts = {name: [getattr(s, name) for s in self._steps] for name in ("lo", "hi", "values", "keys")}
        ends = {name: torch.stack(parts[name]) for name in ("lo", "hi")}
        kept = {name: torch.cat(parts[name]) for name in ("values", "keys")}
        return State({**ends, **kept}, {**self.options(), "kept": [len(v) for v in parts["values"]]})

    @classmethod
    def from_state(cls, state: State) -> Self:
        facts = dict(state.facts)
        kept: list[int] = facts.pop("kept")
        found = cls(**facts)
        parts = zip(state.tensors["values"].split(kept), state.tensors["keys"].split(kept), strict=True)
        for step, (stats, (values, keys)) in enumerate(zip(found._steps, parts, strict=True)):
            stats.lo, stats.hi = state.tensors["lo"][step], state.tensors["hi"][step]
            stats.values, stats.keys = values, keys
        return found


def _joined(parts: list[RangeStats]) -> RangeStats:
    joined = RangeStats()
    joined.lo = torch.stack([p.lo for p in parts]).min()
    joined.hi = torch.stack([p.hi for p in parts]).max()
    joined.values = torch.cat([p.values for p in parts])
    return joined
