"""`tfqc export`: a program for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show


@guarded
def export(
    subject: Annotated[str, typer.Argument(help="An artifact, an .ir program, or a model as `tfqc compile` takes it.")],
    out: Annotated[Path, typer.Option(help="File to write: NAME.pt2.")],
    as_json: options.AsJson = False,
) -> None:
    """Write a program as torch.export does: a .pt2 file, which torch.export.load reads without tfqc, and Netron draws.

    A time that is not in the schedule is computed as the nearest one.
    """
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
    show(value, f"{out}: {size(count)}, {program.model}, {stage}", as_json)
