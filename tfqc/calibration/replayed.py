"""Recorded calls of the model in the place of trajectories: nothing is sampled, they are replayed as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from tfqc.calibration.trajectories import model_key
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Role
from tfqc.runtime.plan import as_time
from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.schedule import SamplingSchedule, nearest


@dataclass(frozen=True)
class ReplayedBatch:
    """A call for each position of the schedule: inputs of @step by name."""

    by_position: Mapping[int, Mapping[str, Tensor]]

    def calls(self, program: Program) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """As `TrajectoryBatch` has them."""
        for position, inputs in self.by_position.items():
            yield position, dict(inputs)


class Replayed:
    """Recorded calls, batch by batch, as `Trajectories` gives what it samples.

    A call counts for the step of the schedule that is nearest to its time; one whose images are at different times is
    taken apart. A step without a call of its own is calibrated on those of the nearest time. Where the model is told no
    time, all calls count for all steps.

    Raises:
        CalibrationError: a call lacks an input of the model.
    """

    calls, exact = 0, False  # that sampling takes: nothing is sampled

    def __init__(self, program: Program, data: ModelCalls, schedule: SamplingSchedule) -> None:
        self.timesteps = schedule.timesteps
        tensors = [(f"{i}.{name}", value) for i, call in enumerate(data.calls) for name, value in call.items()]
        self.key = model_key(program, schedule.timesteps, tensors)
        ascending, position = sorted(schedule.timesteps), {t: i for i, t in enumerate(schedule.timesteps)}
        clock = next((i.name for i in program.input(Role.TIME)), "")
        self._own: dict[int, list[dict[str, Tensor]]] = {}
        times: dict[float, int] = {}  # of calls, and the step that they count for
        for number, call in enumerate(data.calls):
            for inputs in _apart(program, call, number, clock):
                time = as_time(inputs[clock].flatten()[0]) if clock else schedule.timesteps[0]
                times[time] = position[nearest(time, ascending)]
                self._own.setdefault(times[time], []).append(inputs)
        there = sorted(times)
        for step, t in enumerate(schedule.timesteps):
            if step not in self._own:
                self._own[step] = self._own[times[nearest(t, there)]]

    def __len__(self) -> int:
        return max(map(len, self._own.values()))

    def __iter__(self) -> Iterator[ReplayedBatch]:
        return map(self.read, range(len(self)))

    def is_there(self, number: int) -> bool:
        """It need not be sampled."""
        return True

    def read(self, number: int) -> ReplayedBatch:
        """The next call of each step; from the first on again, where a step has fewer than others."""
        steps = range(len(self.timesteps))
        return ReplayedBatch({step: self._own[step][number % len(self._own[step])] for step in steps})

    def sample(self, *_: object) -> NoReturn:
        """Never: all batches are there."""
        raise CalibrationError("Recorded calls are replayed, not sampled.")


def _apart(program: Program, call: Mapping[str, Tensor], number: int, clock: str) -> Iterator[dict[str, Tensor]]:
    """Inputs of @step by name, at one time: a call as it is, or its images one by one."""
    inputs: dict[str, Tensor] = {}
    for item in program.inputs:
        if (path := ".".join(item.path)) not in call:
            raise CalibrationError(f"calibration[{number}] has no {path!r}, which the model needs.")
        inputs[item.name] = call[path]
    if not clock or len(inputs[clock].flatten().unique()) == 1:
        yield inputs
        return
    per_image = {item.name for item in program.inputs if item.type.shape[:1] == ("B",)}
    for i in range(inputs[clock].shape[0]):
        yield {name: value[i : i + 1] if name in per_image else value for name, value in inputs.items()}
