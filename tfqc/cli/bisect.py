"""`tfqc bisect`: the pass that breaks what it declares."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from tfqc.instruments import Culprit


@guarded
def bisect(
    subject: Annotated[str, typer.Argument(help="IR text with its .safetensors, or what `tfqc compile` takes.")],
    pipeline: Annotated[str, typer.Option("-p", "--pipeline", help="Passes: text, or a file of text or YAML.")],
    schedule: options.ScheduleFile = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the model's own sampler, without --schedule.")] = 50,
    calibration_images: Annotated[int, typer.Option(min=1, help="Images to draw for calibration of a model.")] = 4,
    calibration: options.CalibrationFile = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Run passes until one moves the outputs further than it declares, and say where that begins.

    Ends with 1 if there is such a pass. Lossy passes may do what they like.
    """
    import tempfile

    import tfqc
    from tfqc.cli.progress import StderrProgress
    from tfqc.instruments import Bisect, VerifyEach
    from tfqc.instruments.bisect import Found
    from tfqc.ir.store import load_program
    from tfqc.models.find import find_model
    from tfqc.sampling.schedule import SamplingSchedule

    passes = tfqc.Pipeline.parse(options.read_pipeline(pipeline))
    own = None if schedule is None else options.read_schedule(schedule)
    data = None if calibration is None else options.read_calibration(calibration)
    if Path(subject).is_file():
        program = load_program(Path(subject))
    else:
        spec = find_model(subject)
        program = tfqc.capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name, dynamic=spec.dynamic)
        if own is None and spec.scheduler is not None:
            own = SamplingSchedule.of(spec.scheduler, steps)
        data = data or spec.calibration(calibration_images, seed)
    if not program.has_weights:
        raise tfqc.TfqcError(f"{subject} has no weights: what passes do to its outputs cannot be seen.")
    watch = Bisect(seed)
    with tempfile.TemporaryDirectory() as work, StderrProgress() as progress:
        context = tfqc.Context(schedule=own, calibration=data, seed=seed, workdir=Path(work), progress=progress)
        with contextlib.suppress(Found):
            passes.run(program, context, [VerifyEach(), watch])
    value = _value(watch.culprit, len(passes.passes))
    show(value, _text(value), as_json)
    if watch.culprit is not None:
        raise typer.Exit(1)


def _value(culprit: Culprit | None, passes: int) -> dict[str, Any]:
    from dataclasses import asdict

    return {"passes": passes, "culprit": None if culprit is None else asdict(culprit)}


def _text(value: dict[str, Any]) -> str:
    culprit = value["culprit"]
    if culprit is None:
        return f"All {value['passes']} passes keep to what they declare."
    lines = [
        f"#{culprit['number']} {culprit['name']} moved the outputs by {culprit['error']:.2e} relative, "
        f"and declares {culprit['allowed']:g}."
    ]
    lines += [f"differs first: %{name}" for name in culprit["nodes"]]
    lines += [f"was made by it: %{line}" for line in culprit["made"]]
    return "\n".join(lines)
