"""`tfqc compile`: from a model to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options, recipes
from tfqc.cli.keeping import beside, kept_work
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from tfqc.codegen.artifact import Artifact
    from tfqc.instruments import Timing


@guarded
def compile_model(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory of the artifact.")],
    model: Annotated[
        str | None, typer.Argument(help="A built-in name, a diffusers folder, or package.module:factory.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe: what the options say, in a file.")] = None,
    settings: options.Settings = None,
    target: Annotated[str, typer.Option(help="Such as 'fake-quant{weights=4 activations=8}'.")] = "fake-quant",
    pipeline: Annotated[str | None, typer.Option(help="Your own passes: text, or a file of text or YAML.")] = None,
    strategy: Annotated[
        str, typer.Option(help="How temporal features are kept: tib (naive), fold, cache8, select, ...")
    ] = "fold",
    plan: options.PlanFile = None,
    step_policy: options.StepPolicyFile = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of the sampler to compile for; as it is set, or 50.")
    ] = None,
    schedule: options.ScheduleFile = None,
    dynamic: options.Dynamic = None,
    calibration_images: Annotated[int, typer.Option(min=1, help="Images to draw for calibration.")] = 16,
    calibration: options.CalibrationFile = None,
    seed: options.Seed = 0,
    dump_ir: options.DumpDir = None,
    print_ir_after: options.PrintAfter = None,
    verify: options.Verify = "full",
    check_numerics: options.Numerics = False,
    require_real: Annotated[
        bool, typer.Option("--require-real", help="Refuse products with weights for which the target has no kernel.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Compile a model for a target.

    Calibration trajectories are kept in OUT.work until the artifact is written; a pass that fails leaves
    OUT.reproducer.
    """
    import tfqc
    from tfqc.cli.progress import StderrProgress
    from tfqc.codegen.artifact import check_output
    from tfqc.models.find import find_model

    check_output(out)
    watchers, timing = options.instruments(
        verify=verify,
        numerics=check_numerics,
        reproducer=beside(out, "reproducer"),
        dump=dump_ir,
        print_after=print_ir_after,
        as_json=as_json,
    )
    given: dict[str, Any]
    if recipe is not None:
        given = dict(recipes.read(recipe, model, settings or [], context))
        name = given.pop("model")
    elif settings:
        raise typer.BadParameter("--set changes what a recipe says: give --recipe, too.")
    elif model is None:
        raise typer.BadParameter("Give a model, or a recipe that names one.")
    else:
        name = model
        given = {
            "target": tfqc.Target.parse(target),
            "schedule": None if schedule is None else options.read_schedule(schedule),
            "steps": steps,
            "calibration": calibration_images if calibration is None else options.read_calibration(calibration),
            "pipeline": None if pipeline is None else options.read_pipeline(pipeline),
            "strategy": strategy, "plan": plan, "step_policy": step_policy, "dynamic": dynamic, "seed": seed,
            "require_real": require_real,
        }  # fmt: skip
    with kept_work(beside(out, "work")) as work, StderrProgress() as progress:
        spec = find_model(name)
        if recipe is None:
            given["steps"] = _steps(steps, given["schedule"], spec.scheduler)
        artifact = tfqc.compile(spec, **given, workdir=work, instruments=watchers, progress=progress)
        artifact.save(out)
    value = _result(artifact, out, timing, spec.model)
    show(value, _text(value), as_json)


def _steps(steps: int | None, schedule: Any, scheduler: Any) -> int | None:
    from tfqc.cli.subjects import STEPS
    from tfqc.sampling.scheduler import steps_of

    if not (schedule or scheduler):
        return None
    return STEPS if steps is None and steps_of(scheduler) is None else steps


def _result(artifact: Artifact, out: Path, timing: Timing, model: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from tfqc.cli.subjects import artifact_sizes
    from tfqc.codegen.artifact import read_manifest

    return {
        "artifact": str(out),
        "target": artifact.facts["target"],
        "pipeline": artifact.facts["pipeline"],
        "report": artifact.facts["report"],
        "bytes": artifact_sizes(read_manifest(out)),
        "model_bytes_fp32": sum(4 * p.numel() for p in model.parameters()),
        "passes": [asdict(t) for t in timing.passes],
    }


def _text(value: dict[str, Any]) -> str:
    from tfqc.report.tables import size

    lines = [passes_table(value["passes"]), "", *value["report"], ""]
    sizes = ", ".join(f"{name} {size(n)}" for name, n in value["bytes"].items() if name != "total")
    lines.append(f"{value['artifact']}: {size(value['bytes']['total'])} ({sizes})")
    lines.append(f"the model in fp32: {size(value['model_bytes_fp32'])}")
    return "\n".join(lines)


def passes_table(passes: list[dict[str, Any]]) -> str:
    """Where the time went, from rows of `PassTiming`."""
    from tfqc.report.tables import seconds, table

    rows = [(t["number"], t["name"], seconds(t["seconds"]), f"{t['peak_mib']:.0f} MiB", t["nodes"]) for t in passes]
    return table(("#", "pass", "time", "peak memory", "ops per step"), rows, right=(0, 2, 3, 4))
