"""Ranges of the inputs of weighted nodes, per step of the schedule, from calibration trajectories."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import trajectories
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program
from tfqc.passing.context import Context
from tfqc.quant.grid import Grid, RangeMethod, RangeStats, activation_range, range_to_qparams

SAMPLES = 4096  # values kept of each activation and step, where ranges are searched and not just min-max


class StepRanges:
    """Running statistics of one activation at each step."""

    def __init__(self, steps: int, capacity: int) -> None:
        self.steps = [RangeStats(capacity, seed=step) for step in range(steps)]

    @classmethod
    def unknown(cls, steps: int) -> StepRanges:
        """Ranges that stand for others, where nothing is measured."""
        found = cls(steps, capacity=2)
        for stats in found.steps:
            stats.update(torch.tensor([-1.0, 1.0]))
        return found

    def qparams(self, grid: Grid, method: RangeMethod, per_step: bool, intervals: int) -> tuple[Tensor, Tensor]:
        """Scale and zero point, [T] where `per_step` (`intervals` rows repeated, if not 0), else [1]."""
        count = len(self.steps)
        groups = count if intervals == 0 else min(intervals, count)
        owner = [step * groups // count if per_step else 0 for step in range(count)]
        ranges = [
            activation_range(_merge([s for s, o in zip(self.steps, owner, strict=True) if o == g]), grid, method)
            for g in range(groups if per_step else 1)
        ]
        lo, hi = (torch.stack([r[end] for r in ranges]) for end in (0, 1))
        scale, zero_point = range_to_qparams(lo, hi, grid)
        return (scale[owner], zero_point[owner]) if per_step else (scale, zero_point)


def _merge(parts: list[RangeStats]) -> RangeStats:
    merged = RangeStats()
    merged.lo = torch.stack([p.lo for p in parts]).min()
    merged.hi = torch.stack([p.hi for p in parts]).max()
    merged.values = torch.cat([p.values for p in parts])
    return merged


def observe_ranges(
    program: Program, nodes: Iterable[fx.Node], ctx: Context, method: RangeMethod
) -> dict[str, StepRanges]:
    """Statistics of the inputs of `nodes`, by the name of the value that is the input; in a rehearsal unknown ones.

    Raises:
        CalibrationError: an activation is NaN or infinite (which, and at which step).
    """
    assert ctx.schedule is not None
    values = {node.name: node.all_input_nodes[0].name for node in nodes}
    if ctx.rehearsal:
        return {value: StepRanges.unknown(len(ctx.schedule)) for value in values.values()}
    capacity = SAMPLES if method == "mse" else 0
    found = {value: StepRanges(len(ctx.schedule), capacity) for value in values.values()}
    step = 0
    seen: set[str] = set()

    def observe(name: str, value: Tensor) -> None:
        if name in values and values[name] not in seen:
            seen.add(values[name])
            try:
                found[values[name]].steps[step].update(value)
            except CalibrationError as error:
                assert ctx.schedule is not None
                raise CalibrationError(
                    f"The input of {program.at(program.node(name))} is NaN or infinite at timestep "
                    f"{ctx.schedule.timesteps[step]:g}: the model or its calibration inputs are broken there."
                ) from error

    assert ctx.calibration is not None
    run = Simulation(program, program.step, observe=observe)
    batches = -(-len(ctx.calibration) // ctx.calibration.batch_size)
    calls = (call for batch in trajectories(program, ctx) for call in batch.calls(program))
    with torch.no_grad():
        for step, inputs in ctx.progress.track(  # noqa: B007  `observe` reads the step
            calls, "measuring activations", batches * len(ctx.schedule)
        ):
            seen.clear()
            run.call(inputs)
    return found
