"""`tfqc export`: programs and models for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

Format = Literal["pt2", "comfy-int8", "nunchaku-lite"]


@guarded
def export(
    subject: Annotated[str, typer.Argument(help="An artifact, an .ir program, or a model as `tfqc compile` takes it.")],
    out: Annotated[Path, typer.Option(help="What to write: NAME.pt2, NAME.safetensors, or a new folder.")],
    form: Annotated[
        Format, typer.Option("--format", help="A program (pt2), or the weights of a model in another tool's format.")
    ] = "pt2",
    skip: Annotated[
        str,
        typer.Option(help="Of weights: modules that stay as they are, or parts of their names: conv_in,time_embed."),
    ] = "",
    group: Annotated[int, typer.Option(help="Of comfy-int8: columns that are rotated together, a power of 4.")] = 256,
    rank: Annotated[int, typer.Option(help="Of nunchaku-lite: rank of the branch, a multiple of 16.")] = 32,
    as_json: options.AsJson = False,
) -> None:
    """Write a program or the weights of a model for other tools.

    `pt2` is what torch.export writes: torch.export.load reads it without tfqc, and Netron draws it. A time that is not
    in the schedule is computed as the nearest one. `comfy-int8` is a file of int8 weights, rotated (ConvRot), and
    `nunchaku-lite` a folder of diffusers with 4-bit weights; both are made of a model, and no data.
    """
    from tfqc.cli.progress import StderrProgress

    with StderrProgress() as progress, progress.busy(f"exporting to {form}"):
        if form == "pt2":
            value, text = _program(subject, out)
        else:
            value, text = _weights(subject, out, form, [part for part in skip.split(",") if part], group, rank)
    show(value, text, as_json)


def _program(subject: str, out: Path) -> tuple[dict[str, Any], str]:
    import tfqc
    from tfqc.cli.subjects import is_artifact
    from tfqc.codegen.reading import read_program
    from tfqc.ir.store import load_program
    from tfqc.models.find import find_model
    from tfqc.report.tables import size

    if is_artifact(subject):
        program = read_program(subject)
    elif subject.endswith(".ir"):
        program = load_program(Path(subject))
    else:
        spec = find_model(subject)
        program = tfqc.capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name, dynamic=spec.dynamic)
        program = tfqc.Pipeline.parse("normalize").run(program)
    program.save_pt2(out)
    count, stage = out.stat().st_size, str(program.stage)
    value = {"file": str(out), "bytes": count, "stage": stage, "arguments": program.arguments}
    return value, f"{out}: {size(count)}, {program.model}, {stage}"


def _weights(
    subject: str, out: Path, form: Format, skip: list[str], group: int, rank: int
) -> tuple[dict[str, Any], str]:
    from tfqc.cli.subjects import is_artifact
    from tfqc.errors import SpecError
    from tfqc.integrations.formats.convrot import write_convrot
    from tfqc.integrations.formats.nunchaku import write_nunchaku
    from tfqc.models.find import find_model
    from tfqc.report.tables import size

    if is_artifact(subject) or subject.endswith(".ir"):
        raise SpecError(f"{form} is made of a model's own weights, and {subject} is no model: give its folder.")
    model = find_model(subject).model
    if form == "comfy-int8":
        layers, files = write_convrot(model, out, group=group, skip=skip), [out]
    else:
        layers = write_nunchaku(model, out, rank=rank, skip=skip)
        files = list(out.iterdir())
    count = sum(file.stat().st_size for file in files)
    value = {"file": str(out), "bytes": count, "format": form, "layers": layers}
    return value, f"{out}: {size(count)}, {len(layers)} linear layers of {type(model).__name__} in {form}"
