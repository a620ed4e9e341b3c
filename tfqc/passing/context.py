"""What passes may use beside the program: a schedule, calibration data, somebody who shows progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tfqc.progress import Progress, Silent
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule


@dataclass
class Context:
    """What passes may use beside the program.

    `report` collects lines that a pass wants the user to read (what was left in floating point, what was chosen).
    `rehearsal`: passes measure and train nothing; they write parameters of the right shapes, whose values mean nothing
    (`Pipeline.rehearse`). `plan` is a plan for quantization, as a person wrote it (`tfqc.quant.plan_text`): what it
    says comes before what options say.
    """

    schedule: SamplingSchedule | None = None
    calibration: Calibration | None = None
    seed: int = 0
    workdir: Path | None = None
    progress: Progress = field(default_factory=Silent)
    report: list[str] = field(default_factory=list[str])
    rehearsal: bool = False
    plan: str = ""
