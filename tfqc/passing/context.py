"""What passes may use beside the program: a schedule, calibration data, somebody who shows progress."""

from __future__ import annotations

from collections.abc import Generator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfqc.errors import PassError
from tfqc.passing.remarks import Number, Remark
from tfqc.progress import Progress, Silent
from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule


@dataclass
class Context:
    """What passes may use beside the program.

    `remarks` collects what passes want the user to read (what was left in floating point, what was chosen), `report` is
    that in sentences. `pass_name` and `pass_number` are of the pass that runs; the pipeline sets them.
    `rehearsal`: passes measure and train nothing; they write parameters of the right shapes, whose values mean nothing
    (`Pipeline.rehearse`).
    `foreseen`, `observed`: what passes asked in the rehearsal to be observed, and what of it is there
    (`tfqc.calibration.observe`). A rehearsal and its run share them.
    `plan` is a plan for quantization, as a person wrote it (`tfqc.quant.plan_text`): what it says comes before what
    options say.

    Raises:
        PassError: a schedule or calibration data of another class.
    """

    schedule: SamplingSchedule | None = None
    calibration: Calibration | ModelCalls | None = None
    seed: int = 0
    workdir: Path | None = None
    progress: Progress = field(default_factory=Silent)
    remarks: list[Remark] = field(default_factory=list[Remark])
    rehearsal: bool = False
    plan: str = ""
    foreseen: dict[tuple[str, str, str], list[Any]] = field(default_factory=dict[tuple[str, str, str], list[Any]])
    observed: dict[tuple[str, str, str], Any] = field(default_factory=dict[tuple[str, str, str], Any])
    pass_name: str = ""
    pass_number: int = 0

    def __post_init__(self) -> None:
        # `tfqc.compile` takes lists in their place; what a pass would say of one is no help.
        if not isinstance(self.schedule, SamplingSchedule | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PassError(
                f"schedule is a {type(self.schedule).__name__}: give a context a tfqc.SamplingSchedule, such as "
                "SamplingSchedule((999.0, 499.0)) or SamplingSchedule.of(scheduler, steps)."
            )
        if not isinstance(self.calibration, Calibration | ModelCalls | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PassError(
                f"calibration is a {type(self.calibration).__name__}: give a context tfqc.Calibration(noise, {...}), "
                "or tfqc.sampling.calls.ModelCalls.of([{...}, ...]) for calls of the model."
            )

    def need_schedule(self) -> SamplingSchedule:
        """The schedule, which passes have that declare `schedule` or `sampler` in `data`."""
        if self.schedule is None:
            raise self._lacking("schedule")
        return self.schedule

    def need_calibration(self) -> Calibration | ModelCalls:
        """The calibration data, which passes have that declare `calibration` in `data`."""
        if self.calibration is None:
            raise self._lacking("calibration")
        return self.calibration

    def lacks(self, data: Set[str]) -> str:
        """What is not here of what a pass needs from outside (`Pass.data`): the end of a sentence; empty if nothing."""
        if data & {"schedule", "sampler"} and self.schedule is None:
            return "needs a schedule: give one (schedule=...)"
        if "calibration" in data and self.calibration is None:
            return "needs a calibration: give one (calibration=...)"
        if "sampler" not in data or self.schedule is None or isinstance(self.calibration, ModelCalls):
            return ""
        if not (why := self.schedule.cannot_sample):
            return ""
        if self.schedule.own is None:
            return (
                "samples images, so it needs a diffusers scheduler, not bare timesteps: give one (schedule=...), or "
                "calls of the model (calibration=[{...}, ...])"
            )
        return f"samples images, and {why}: give another scheduler (schedule=...)"

    def _lacking(self, data: str) -> PassError:
        return PassError(f"{self.pass_name or 'What was called'} {self.lacks({data})}.")

    def remark(self, kind: str, node: str = "", /, **numbers: Number) -> None:
        """Say something, in the name of the pass that runs. `tfqc.passing.remarks` has the kinds.

        Raises:
            PassError: the kind is not known (with a suggestion), or its sentence wants other numbers.
        """
        said = Remark(self.pass_name, kind, node, numbers, self.pass_number)
        str(said)
        self.remarks.append(said)

    @property
    def report(self) -> tuple[str, ...]:
        """The remarks as sentences."""
        return tuple(map(str, self.remarks))

    @contextmanager
    def running(self, name: str, number: int) -> Generator[None]:
        """While a pass runs, what is said is its own."""
        outer = self.pass_name, self.pass_number
        self.pass_name, self.pass_number = name, number
        try:
            yield
        finally:
            self.pass_name, self.pass_number = outer
