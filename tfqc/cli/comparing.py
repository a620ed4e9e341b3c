"""`tfqc compare`: two models or artifacts, sampled from the same seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show
from tfqc.cli.sampling import Model, Steps

if TYPE_CHECKING:
    from tfqc.cli.subjects import Subject
    from tfqc.report.runs import Run

_OURS, _SIGN = r"compared\.(png|json)|trajectory\.png", r"compared\.json"


@guarded
def compare(
    a: Annotated[str, typer.Argument(help="The reference: a model, or an artifact's directory.")],
    b: Annotated[str, typer.Argument(help="What is compared with it.")],
    images: options.Images = 40,
    steps: Steps = None,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Directory for pictures and compared.json.")] = None,
    model: Model = None,
    as_json: options.AsJson = False,
) -> None:
    """Sample A and B from the same seeds: PSNR at each step and in the end, metrics, sizes, time, a picture."""
    from tfqc.cli.progress import StderrProgress
    from tfqc.cli.subjects import STEPS, subject
    from tfqc.errors import TfqcError
    from tfqc.files.claim import claim
    from tfqc.report.runs import draw

    if out is not None:
        claim(out, _OURS, "result of a comparison", _SIGN)
    first, second = subject(a, model), subject(b, model)
    if first.spec.sample_shape() != second.spec.sample_shape():
        raise TfqcError(
            f"{a} and {b} cannot be compared: samples of {first.spec.sample_shape()} and {second.spec.sample_shape()}."
        )
    # An artifact says which sampler it was compiled for; a model leaves that open.
    compiled = next((s for s in (first, second) if s.steps is not None), first)
    count = steps or compiled.steps or STEPS
    with StderrProgress() as progress:
        run_a, run_b = (
            draw(
                found.denoiser,
                first.spec,
                compiled.scheduler,
                steps=count,
                images=images,
                seed=seed,
                time_of=compiled.time_of,
                progress=progress,
                what=f"sampling {found.name}",
            )
            for found in (first, second)
        )
    value = _result(first, second, run_a, run_b, seed)
    if out is not None:
        _write(out, value, first, second, run_a, run_b)
    show(value, _text(value, out), as_json)


def _result(first: Subject, second: Subject, run_a: Run, run_b: Run, seed: int) -> dict[str, Any]:
    from tfqc.report import quality

    metrics_a, few = quality.measure(first.spec.metrics, run_a)
    metrics_b, _ = quality.measure(first.spec.metrics, run_b)

    def facts(found: Subject, run: Run, metrics: dict[str, float]) -> dict[str, Any]:
        return {
            "name": found.name,
            "bytes": found.sizes,
            "metrics": metrics,
            "seconds_per_image": round(run.seconds_per_image, 5),
        }

    return {
        "images": run_a.latents.shape[1],
        "seed": seed,
        "timesteps": list(run_a.timesteps),
        "data_range": {"latents": quality.latent_range(run_a), "images": 1.0},
        "psnr_by_step": quality.psnr_by_step(run_a, run_b),
        "psnr_latents": quality.psnr_by_step(run_a, run_b)[-1],
        "psnr_images": quality.psnr_of_images(run_a, run_b),
        "metrics_left_out": few,
        "a": facts(first, run_a, metrics_a),
        "b": facts(second, run_b, metrics_b),
    }


def _text(value: dict[str, Any], out: Path | None) -> str:
    from tfqc.report.tables import decibel, seconds, size, table

    sides = (value["a"], value["b"])
    rows: list[tuple[str, ...]] = [
        (f"size, {name}", *(size(side["bytes"][name]) if name in side["bytes"] else "-" for side in sides))
        for name in dict.fromkeys([*sides[0]["bytes"], *sides[1]["bytes"]])
    ]
    rows += [(metric, *(f"{side['metrics'][metric]:.4g}" for side in sides)) for metric in sides[0]["metrics"]]
    rows.append(("time per image", *(seconds(side["seconds_per_image"]) for side in sides)))
    by_step = value["psnr_by_step"]
    shown = sorted({round(i * (len(by_step) - 1) / 4) for i in range(5)})
    steps = table(
        ("after timestep", *(f"{value['timesteps'][i]:g}" for i in shown)),
        [("PSNR of the latents", *(decibel(by_step[i]) for i in shown))],
        right=range(1, len(shown) + 1),
    )
    final = decibel(value["psnr_images"] if value["psnr_images"] is not None else value["psnr_latents"])
    lines = [
        table(("", *(side["name"] for side in sides)), rows, right=(1, 2)),
        "",
        steps,
        "",
        f"final images: {final} to {sides[0]['name']}, mean over {value['images']} images of the same seeds",
        f"(data range of the latents: {value['data_range']['latents']:.3g})",
    ]
    if value["metrics_left_out"]:
        lines.append(f"left out, too few images: {', '.join(value['metrics_left_out'])}")
    if out is not None:
        lines.append(f"pictures and numbers: {out}")
    return "\n".join(lines)


def _write(out: Path, value: dict[str, Any], first: Subject, second: Subject, run_a: Run, run_b: Run) -> None:
    from tfqc.cli.sampling import column_labels, pictures
    from tfqc.files.storage import write_text
    from tfqc.report import grids, plots

    write_text(out / "compared.json", json.dumps(value, indent=1) + "\n")  # first: it says whose the pictures are
    images_a, images_b = pictures(run_a)[:10], pictures(run_b)[:10]
    error, factor = grids.difference(images_a, images_b)
    grid = grids.image_grid(
        [images_a, images_b, error],
        row_labels=[Path(first.name).name, Path(second.name).name, f"{factor:.3g} |difference|"],
        column_labels=column_labels(first, run_a),
    )
    grids.save_picture(grid, out / "compared.png")
    plots.plot_trajectories(
        {Path(second.name).name: value["psnr_by_step"]},
        value["timesteps"],
        out / "trajectory.png",
        f"Distance to {first.name} along the sampler",
    )
