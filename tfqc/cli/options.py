"""Options that several commands have, and the reading of files that they name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tfqc.errors import CalibrationError, PipelineError

if TYPE_CHECKING:
    from tfqc.instruments import Instrument, Timing
    from tfqc.sampling.calls import ModelCalls
    from tfqc.sampling.data import Calibration
    from tfqc.sampling.schedule import SamplingSchedule

Verify = Annotated[
    Literal["full", "fast", "off"],
    typer.Option("--verify", help="Check the program after each pass: all, all but types, or not at all."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Images = Annotated[int, typer.Option(min=1, help="How many images.")]
DumpDir = Annotated[Path | None, typer.Option("--dump-ir", help="Write the IR here after each pass that changed it.")]
PrintAfter = Annotated[
    str | None, typer.Option("--print-ir-after", help="Print the IR after a pass, after `all`, or each `change`.")
]
Numerics = Annotated[
    bool, typer.Option("--check-numerics", help="Run the program before and after each pass that is not lossy.")
]
ScheduleFile = Annotated[
    Path | None, typer.Option("--schedule", help="JSON: a list of timesteps, or {timesteps, sampler}.")
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="What is quantized to what, as `tfqc inspect --plan` prints it.")
]
StepPolicyFile = Annotated[
    Path | None,
    typer.Option("--step-policy", help="A config.json that says at which steps inputs stay in floating point."),
]
Dynamic = Annotated[
    str | None,
    typer.Option(help="Dimensions that may differ from call to call: H,W or H:32..128,W or hidden_states[1]=S."),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A key of the recipe: steps=30, target.weights=4; null removes one.")
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Your own calibration data, as Calibration.save wrote them.")
]


def read_pipeline(text_or_file: str) -> str:
    """Pipeline text, from a file if one of that name is there.

    Raises:
        PipelineError: what is given looks like a file's name, and there is none.
    """
    path = Path(text_or_file)
    named = "\n" not in text_or_file and "{" not in text_or_file
    if named and os.path.isfile(path):  # Path's own raises for text that is too long for a name
        from tfqc.files.storage import read_text

        return read_text(path, PipelineError)
    if named and (path.suffix in (".txt", ".yaml", ".yml") or "/" in text_or_file):
        raise PipelineError(f"There is no pipeline file {text_or_file}.")
    return text_or_file


def read_schedule(path: Path) -> SamplingSchedule:
    """A schedule from JSON: a list of timesteps, or what `SamplingSchedule.to_json` writes.

    Raises:
        CalibrationError: no such file, no JSON, or no schedule.
    """
    from tfqc.files.storage import read_text
    from tfqc.sampling.schedule import SamplingSchedule

    try:
        text = read_text(path, CalibrationError)
    except CalibrationError as error:
        raise CalibrationError(f"The schedule {error}") from error
    schedule = SamplingSchedule.from_json(text, str(path))
    if not schedule.cannot_sample:
        schedule.scheduler()  # what it cannot be set to is said before the time is spent
    return schedule


def read_calibration(path: Path) -> Calibration | ModelCalls:
    """Calibration data, or calls of the model, from a file.

    Raises:
        CalibrationError: it holds neither.
    """
    from tfqc.sampling.calls import load_calibration

    return load_calibration(path)


def instruments(
    *,
    verify: Literal["full", "fast", "off"],
    numerics: bool,
    reproducer: Path | None,
    dump: Path | None,
    print_after: str | None,
    as_json: bool,
) -> tuple[list[Instrument], Timing]:
    """The instruments that options ask for, and `Timing`, the last of them.

    Printed IR keeps off stdout where JSON stands.
    """
    import sys

    from tfqc.instruments import CheckNumerics, DumpIR, PrintIR, Reproducer, Timing, VerifyEach

    found: list[Instrument] = [] if verify == "off" else [VerifyEach(verify)]
    if numerics:
        found.append(CheckNumerics())
    if reproducer is not None:
        found.append(Reproducer(reproducer))
    if dump is not None:
        found.append(DumpIR(dump))
    if print_after is not None:
        found.append(PrintIR(print_after, sys.stderr if as_json else sys.stdout))
    timing = Timing(dump)
    return [*found, timing], timing
