"""`tfqc demo`: the built-in model at W4A8, with naive and with folded temporal features, and in real 8-bit integers,
beside full precision."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.keeping import beside, kept_work
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from tfqc.instruments.timing import PassTiming
    from tfqc.ir.program import Program
    from tfqc.models.spec import ModelSpec
    from tfqc.passing.pipeline import Pipeline
    from tfqc.progress import Progress
    from tfqc.report.disturbance import FeatureErrors
    from tfqc.report.runs import Run

MODEL, TARGET = "fashion-unet", "fake-quant{weights=4 activations=8}"
FULL = "full precision"
COMPILED = {"naive": (TARGET, "tib"), "fold": (TARGET, "fold"), "int8": ("cpu-int8", "fold")}  # target, strategy
CALIBRATION_IMAGES = 16
SHOWN = 20  # images in the picture; the numbers are of all
_OURS, _SIGN = r"(grid|disturbance|trajectory)\.png|results\.json|ir|naive|fold|int8", r"results\.json"


@dataclass(frozen=True)
class Compiled:
    """One of the artifacts, and what was seen while it was made."""

    directory: Path
    bytes: dict[str, int]
    passes: list[PassTiming]
    seconds: float
    errors: FeatureErrors | None


@guarded
def demo(
    out: Annotated[Path, typer.Option(help="Directory for what it leaves.")] = Path("demo-out"),
    images: options.Images = 40,
    steps: Annotated[int, typer.Option(min=2, help="Steps of the sampler.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images; calibration has its own.")] = 1,
    as_json: options.AsJson = False,
) -> None:
    """Compile the built-in model and compare images of the same seeds: to W4A8, naively and with folded time, and to
    8-bit integers for this CPU.

    Leaves pictures, both artifacts, the IR after each pass, and results.json.
    """
    import tfqc
    from tfqc.cli.progress import StderrProgress
    from tfqc.files.claim import claim
    from tfqc.files.storage import write_text
    from tfqc.frontend import capture
    from tfqc.models.find import find_model
    from tfqc.report.runs import draw

    claim(out, _OURS, "result of the demo", _SIGN)
    began = time.perf_counter()
    spec = find_model(MODEL)
    with StderrProgress() as progress:
        progress.say(f"capturing {spec.name}")
        program = capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name)
        with kept_work(beside(out, "work")) as work:
            compiled = {
                name: _compile(program, spec, target, strategy, out, name, work, steps, progress)
                for name, (target, strategy) in COMPILED.items()
            }
        denoisers = {FULL: spec.model, **{name: tfqc.load(c.directory) for name, c in compiled.items()}}
        runs = {
            name: draw(
                denoiser,
                spec,
                spec.scheduler,
                steps=steps,
                images=images,
                seed=seed,
                progress=progress,
                what=f"sampling {images} images, {name}",
            )
            for name, denoiser in denoisers.items()
        }
    value = _result(spec, compiled, runs)
    value["seconds"] = round(time.perf_counter() - began, 1)
    write_text(out / "results.json", json.dumps(value, indent=1) + "\n")  # first: it says whose the pictures are
    _pictures(out, spec, compiled["naive"], runs, value)
    show(value, _text(value, out), as_json)


def _compile(
    program: Program,
    spec: ModelSpec,
    text: str,
    strategy: str,
    out: Path,
    name: str,
    work: Path,
    steps: int,
    progress: Progress,
) -> Compiled:
    import tfqc
    from tfqc.cli.subjects import artifact_sizes
    from tfqc.codegen.artifact import read_manifest
    from tfqc.instruments import DumpIR, Reproducer, Timing, VerifyEach
    from tfqc.report.disturbance import WatchDisturbance

    target = tfqc.Target.parse(text)
    pipeline = tfqc.Pipeline.parse(target.backend.pipeline(target.options, strategy))
    directory, dumps = out / name, out / "ir" / name
    watch, timing = WatchDisturbance(), Timing(dumps)
    dumps.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    artifact = tfqc.compile(
        program,
        target,
        schedule=spec.scheduler,
        steps=steps,
        calibration=spec.calibration(CALIBRATION_IMAGES, seed=0),
        pipeline=_measured_as_compiled(pipeline),
        workdir=work,
        instruments=[VerifyEach(), Reproducer(beside(directory, "reproducer")), DumpIR(dumps), watch, timing],
        progress=progress,
    )
    artifact.save(directory)
    sizes = artifact_sizes(read_manifest(directory))
    return Compiled(directory, sizes, timing.passes, time.perf_counter() - began, watch.found)


def _measured_as_compiled(pipeline: Pipeline) -> Pipeline:
    """The same passes, the disturbance measured behind the calibrations: on the quantizers that the artifact has."""
    passes = list(pipeline.passes)
    measured = next(p for p in passes if p.name == "measure-disturbance")
    passes.remove(measured)
    passes.insert(next(i for i, p in enumerate(passes) if p.name == "fold-cache"), measured)
    return type(pipeline)(tuple(passes))


def _result(spec: ModelSpec, compiled: dict[str, Compiled], runs: dict[str, Run]) -> dict[str, Any]:
    from tfqc.cli.subjects import model_sizes
    from tfqc.report import quality

    reference = runs[FULL]
    rows: dict[str, dict[str, Any]] = {}
    few: list[str] = []
    for name, run in runs.items():
        metrics, few = quality.measure(spec.metrics, run)
        rows[name] = {"metrics": metrics, "seconds_per_step": round(run.seconds_per_step, 6)}
        if name in compiled:
            made = compiled[name]
            rows[name] |= {
                "target": COMPILED[name][0],
                "speed_up": reference.seconds / run.seconds,
                "bytes": made.bytes,
                "features": made.errors.summary(COMPILED[name][1]) if made.errors else None,
                "psnr_images": quality.psnr_of_images(reference, run),
                "psnr_by_step": quality.psnr_by_step(reference, run),
                "compile_seconds": round(made.seconds, 2),
                "operations_per_step": made.passes[-1].nodes,
                "passes": [asdict(t) for t in made.passes],
            }
        else:
            rows[name]["bytes"] = model_sizes(spec)
    return {
        "model": spec.name,
        "images": len(reference.latents[0]),
        "timesteps": list(reference.timesteps),
        "data_range": {"latents": quality.latent_range(reference), "images": 1.0},
        "metrics_left_out": few,
        "rows": rows,
    }


def _pictures(out: Path, spec: ModelSpec, naive: Compiled, runs: dict[str, Run], value: dict[str, Any]) -> None:
    from tfqc.report import grids, plots

    columns = len(spec.class_names)
    count = min(SHOWN, value["images"])
    images = {name: run.images for name, run in runs.items()}
    strips = [
        (name, drawn[first : min(first + columns, count)])
        for first in range(0, count, columns)
        for name, drawn in images.items()
        if drawn is not None
    ]
    labels = runs[FULL].labels
    assert labels is not None
    picture = grids.image_grid(
        [strip for _, strip in strips],
        row_labels=[name for name, _ in strips],
        column_labels=[spec.class_names[int(label)] for label in labels[:columns]],
        block=len(images),
    )
    grids.save_picture(picture, out / "grid.png")
    if naive.errors is not None:
        title = f"{spec.name}, {TARGET}: disturbance of temporal features"
        plots.plot_disturbance(naive.errors, out / "disturbance.png", title)
    plots.plot_trajectories(
        {name: row["psnr_by_step"] for name, row in value["rows"].items() if name in COMPILED},
        value["timesteps"],
        out / "trajectory.png",
        f"{spec.name}: distance to full precision along the sampler",
    )


def _text(value: dict[str, Any], out: Path) -> str:
    from tfqc.report.tables import decibel, seconds, table

    rows = value["rows"]
    names = list(rows)

    def line(what: str, of: Any) -> tuple[str, ...]:
        return (what, *(of(rows[name]) for name in names))

    def feature(key: str, form: str) -> Any:
        return lambda row: format(row["features"][key], form) if row.get("features") else "-"

    measures = [
        line("size: model in fp32, whole artifact", lambda r: _size(r, "fp32", "total")),
        line("size: in fp16, weights and tables", lambda r: _size(r, "fp16", "weights.safetensors")),
        line("size: time path, read off schedule only", lambda r: _size(r, "time.safetensors")),
        line("temporal features: mean 1 − cos", feature("mean_error", ".2g")),
        line("temporal features: worst cos", feature("worst_cosine", ".6f")),
        line("temporal features: mistaken for another step", feature("mismatch_share", ".1%")),
        line("PSNR of images to full precision", lambda r: decibel(r.get("psnr_images"))),
        *(line(metric, lambda r, m=metric: f"{r['metrics'][m]:.3g}") for metric in rows[FULL]["metrics"]),
        line(f"time per step of {value['images']} images", lambda r: seconds(r["seconds_per_step"])),
        line("times as fast as full precision", lambda r: f"{r['speed_up']:.1f}" if "speed_up" in r else "-"),
        line("operations per step", lambda r: str(r.get("operations_per_step", "-"))),
    ]
    spent = {name: _time_spent(row) for name, row in rows.items() if "passes" in row}
    items = dict.fromkeys(item for passes in spent.values() for item in passes if item not in (REST, ALL))
    times = [(item, *(seconds(passes.get(item, 0)) for passes in spent.values())) for item in (*items, REST, ALL)]
    lines = [
        f"{value['model']}, {len(value['timesteps'])} steps, {value['images']} images",
        *(f"{name}: {row['target']}" for name, row in rows.items() if "target" in row),
        "",
        table(("", *names), measures, right=range(1, len(names) + 1)),
        *(f"{metric}: left out, too few images" for metric in value["metrics_left_out"]),
        "",
        table(("compile time", *spent), times, right=range(1, len(spent) + 1)),
        "(later compiles find the calibration trajectories and the rounded weights of the first)",
        "",
        f"{out}/grid.png         the images side by side",
        f"{out}/disturbance.png  temporal features, feature x timestep",
        f"{out}/trajectory.png   distance to full precision along the sampler",
        f"{out}/ir/              the program after each pass",
        f"{out}/results.json     these numbers",
        f"Done in {value['seconds']:.0f} s.",
    ]
    return "\n".join(lines)


REST, ALL = "dumps, emission", "together"


def _time_spent(row: dict[str, Any]) -> dict[str, float]:
    """Seconds by pass, of the rest, and together. A pass may have run twice."""
    spent: dict[str, float] = {}
    for timing in row["passes"]:
        spent[timing["name"]] = spent.get(timing["name"], 0) + timing["seconds"]
    rest = row["compile_seconds"] - sum(spent.values())
    return {**spent, REST: rest, ALL: row["compile_seconds"]}


def _size(row: dict[str, Any], *names: str) -> str:
    """Bytes of the first of the names that the row has."""
    from tfqc.report.tables import size

    return next((size(row["bytes"][name]) for name in names if name in row["bytes"]), "-")
