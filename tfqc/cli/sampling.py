"""`tfqc sample`: images from a model or an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from torch import Tensor

    from tfqc.cli.subjects import Subject
    from tfqc.report.runs import Run

Model = Annotated[str | None, typer.Option(help="What an artifact was made from, where that is no built-in model.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Steps of the sampler; by default those it was compiled for, or 50.")
]


@guarded
def sample(
    what: Annotated[str, typer.Argument(metavar="ARTIFACT_OR_MODEL", help="An artifact's directory, or a model.")],
    out: Annotated[Path, typer.Option(help="The picture (.png), or .safetensors for final latents.")],
    images: options.Images = 40,
    steps: Steps = None,
    seed: options.Seed = 0,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; the model's own.")] = None,
    model: Model = None,
    as_json: options.AsJson = False,
) -> None:
    """Sample images and save them as one picture, in columns of the same class where the model has classes.

    Without a decoder the picture shows the channels of the final latents side by side.
    """
    from tfqc.cli.progress import StderrProgress
    from tfqc.cli.subjects import STEPS, subject
    from tfqc.report.runs import draw

    _check_picture(out)
    found = subject(what, model)
    with StderrProgress() as progress:
        run = draw(
            found.denoiser,
            found.spec,
            found.scheduler,
            steps=steps or found.steps or STEPS,
            images=images,
            seed=seed,
            guidance=guidance,
            time_of=found.time_of,
            progress=progress,
            what=f"sampling {found.name}",
        )
    _save(found, run, out)
    value = {
        "out": str(out),
        "images": images,
        "steps": len(run.timesteps),
        "seed": seed,
        "guidance": found.spec.guidance if guidance is None else guidance,
        "seconds": round(run.seconds, 3),
        "seconds_per_image": round(run.seconds_per_image, 5),
    }
    show(value, f"{out}: {images} images, {len(run.timesteps)} steps, {run.seconds:.1f} s", as_json)


def _save(found: Subject, run: Run, out: Path) -> None:
    from tfqc.report import grids

    if out.suffix == ".safetensors":
        from tfqc.files.storage import write_tensors

        write_tensors(out, {"latents": run.latents[-1]})
        return
    images = pictures(run)
    labels = column_labels(found, run)
    columns = len(labels) or round(len(images) ** 0.5)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    grids.save_picture(grids.image_grid(rows, column_labels=labels), out)


def pictures(run: Run) -> Tensor:
    """Images [N, C, H, W] in 0..1 of a run: decoded ones, or the channels of the latents."""
    from tfqc.errors import TfqcError
    from tfqc.report.grids import tiled_channels

    if run.images is not None:
        return run.images
    final = run.latents[-1]
    if final.dim() != 4:
        raise TfqcError(
            f"Latents of shape {tuple(final.shape[1:])} make no picture: give --out a name that ends in .safetensors."
        )
    return tiled_channels(final)


def column_labels(found: Subject, run: Run) -> list[str]:
    """Class names of the columns of a grid that is as wide as there are classes; none for other models."""
    names = found.spec.class_names
    if not names or run.labels is None:
        return []
    return [names[int(label)] for label in run.labels[: len(names)]]


def _check_picture(out: Path) -> None:
    """Refuse a place or a format that cannot be written, before the time is spent."""
    from tfqc.errors import TfqcError

    if out.is_dir():
        raise TfqcError(f"{out} is a directory: give the picture a file name, such as {out / 'grid.png'}.")
    if out.suffix not in ("", ".png", ".jpg", ".jpeg", ".webp", ".safetensors"):
        raise TfqcError(f"{out}: pictures are written as .png, .jpg or .webp, latents as .safetensors.")
