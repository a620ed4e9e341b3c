"""The `disturbance` table of a program as plain numbers, for plots and tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tfqc.errors import TfqcError
from tfqc.instruments import Instrument
from tfqc.ir.program import Program
from tfqc.ir.rows import Disturbance
from tfqc.passing.base import Pass
from tfqc.temporal.features import feature_label

ROUNDING = 1e-14  # of a cosine in float64: what is below is no error


@dataclass(frozen=True)
class FeatureErrors:
    """Cosine error 1 − cos(e, ê) and mismatch δ of each feature at each timestep, by strategy: [features][T] each."""

    labels: tuple[str, ...]
    timesteps: tuple[float, ...]
    cosine_error: dict[str, list[list[float]]]
    mismatch: dict[str, list[list[int]]]

    def summary(self, strategy: str) -> dict[str, float]:
        """`mean_error`, `worst_cosine` and `mismatch_share` over all features and steps."""
        error = torch.tensor(self.cosine_error[strategy], dtype=torch.float64)
        mismatch = torch.tensor(self.mismatch[strategy])
        return {
            "mean_error": float(error.mean()),
            "worst_cosine": 1 - float(error.max()),
            "mismatch_share": float((mismatch != 0).double().mean()),
        }


def feature_errors(program: Program) -> FeatureErrors | None:
    """What `measure-disturbance` found; None if it did not run or found no features."""
    rows = program.table(Disturbance)
    if not rows:
        return None
    first = next(iter(rows.values()))
    return FeatureErrors(
        tuple(label(program, name) for name in rows),
        tuple(first.timesteps),
        {s: [[_error(c) for c in row.cosine[s]] for row in rows.values()] for s in first.cosine},
        {s: [list(row.mismatch[s]) for row in rows.values()] for s in first.mismatch},
    )


def _error(cosine: float) -> float:
    return 0.0 if 1 - cosine < ROUNDING else 1 - cosine


def label(program: Program, feature: str) -> str:
    """Module path of the embedding layer behind a feature; its node's name where that node has been folded away."""
    try:
        return feature_label(program, feature)
    except TfqcError:
        return feature


class WatchDisturbance(Instrument):
    """Keeps what the last `measure-disturbance` of a run found, while the features still have their layers."""

    def __init__(self) -> None:
        self.found: FeatureErrors | None = None

    def after(self, program: Program, previous: Program, item: Pass, number: int) -> None:
        if Disturbance in item.contract().provides:
            self.found = feature_errors(program)
