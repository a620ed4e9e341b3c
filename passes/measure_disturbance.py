"""measure-disturbance: the three symptoms (tfqc/README.md), for each temporal feature, step and strategy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Disturbance, Tib, Trajectory
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.temporal.deviation import tib_trajectory_deviation
from tfqc.temporal.disturbance import symptoms
from tfqc.temporal.features import tib_run
from tfqc.temporal.strategies import STRATEGIES, disturbed, stored_bytes


@dataclass(frozen=True)
class MeasureDisturbance(Pass):
    """Measure what quantization does to the temporal features: error, mismatch, and deviation of the trajectory.

    Options: weights, activations (bits of the naive TIB, for nodes that no pass has quantized yet); strategies;
    trajectory (images for the third symptom, sampled with only the TIB quantized; 0 leaves it out).
    """

    name: ClassVar[str] = "measure-disturbance"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Disturbance, Trajectory})
    data: ClassVar[frozenset[str]] = frozenset({"schedule", "weights"})

    weights: int = 8
    activations: int = 8
    strategies: tuple[str, ...] = ("tib", "cache4", "cache8", "fold")
    trajectory: int = 0

    def __post_init__(self) -> None:
        if unknown := [s for s in self.strategies if s not in STRATEGIES]:
            raise ValueError(f"{unknown[0]!r} is no strategy: {', '.join(STRATEGIES)}")
        for bits in (self.weights, self.activations):
            if not 2 <= bits <= 8:
                raise ValueError(f"bits={bits} is out of range: 2 to 8")
        if not self.strategies:
            raise ValueError("strategies: at least one")
        if self.trajectory < 0:
            raise ValueError(f"trajectory={self.trajectory} is negative")

    def contract(self) -> Contract:
        """A column for each strategy; images are sampled for the trajectory alone."""
        its = super().contract()
        columns = {Disturbance.column(strategy) for strategy in self.strategies}
        sampled = {"sampler", "calibration"} if self.trajectory else set[str]()
        return replace(its, provides=its.provides | columns, data=its.data | sampled)

    def run(self, program: Program, ctx: Context) -> None:
        """Provide `disturbance` and `trajectory` (empty unless asked for)."""
        timesteps = ctx.need_schedule().timesteps
        if not any(row.part == "feature" for row in program.table(Tib).values()):
            program.set_table(Disturbance, {})
            program.set_table(Trajectory, {})
            return
        run = tib_run(program, ctx)
        if ctx.rehearsal:
            self._rehearse(program, run.names, timesteps)
            return
        with torch.no_grad():
            exact = run()
        for name, value in exact.items():
            if not bool(torch.isfinite(value).all()):
                raise CalibrationError(f"Temporal feature {program.at(program.node(name))} is NaN or infinite.")
        bits = (self.weights, self.activations)
        measured = {
            strategy: {
                name: symptoms(exact[name], value)
                for name, value in disturbed(program, run, strategy, exact, bits).items()
            }
            for strategy in ctx.progress.track(self.strategies, "measuring temporal features", len(self.strategies))
        }
        rows: dict[str, Disturbance] = {}
        for name, value in exact.items():
            size = value[0, 0].numel()
            found = {s: measured[s][name] for s in self.strategies}
            rows[name] = Disturbance(
                timesteps=timesteps,
                cosine={s: f.cosine for s, f in found.items()},
                relative_l2={s: f.relative_l2 for s, f in found.items()},
                mismatch={s: f.mismatch for s, f in found.items()},
                bytes={s: stored_bytes(program, name, s, len(timesteps), size) for s in self.strategies},
            )
        program.set_table(Disturbance, rows)
        deviation = tib_trajectory_deviation(program, ctx, bits, self.trajectory) if self.trajectory else ()
        program.set_table(Trajectory, {"tib": Trajectory(deviation)} if deviation else {})

    def _rehearse(self, program: Program, features: tuple[str, ...], timesteps: tuple[float, ...]) -> None:
        """Rows that say of every strategy that it disturbs nothing."""
        count = len(timesteps)
        ones, zeros = dict.fromkeys(self.strategies, (1.0,) * count), dict.fromkeys(self.strategies, (0.0,) * count)
        shifts, nothing = dict.fromkeys(self.strategies, (0,) * count), dict.fromkeys(self.strategies, 0)
        row = Disturbance(timesteps, ones, zeros, shifts, nothing)
        program.set_table(Disturbance, dict.fromkeys(features, row))
        program.set_table(Trajectory, {})
