"""`tfqc opt`: passes over a program on disk."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from tfqc.cli import options
from tfqc.cli.compiling import passes_table
from tfqc.cli.keeping import beside, kept_work
from tfqc.cli.output import guarded, note, show


@guarded
def opt(
    program: Annotated[Path, typer.Argument(help="IR text, with its .safetensors beside it if it has weights.")],
    pipeline: Annotated[str, typer.Option("-p", "--pipeline", help="Passes: text, or a file of text or YAML.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where the result goes; stdout without it (IR alone).")
    ] = None,
    plan: options.PlanFile = None,
    schedule: options.ScheduleFile = None,
    calibration: options.CalibrationFile = None,
    seed: options.Seed = 0,
    dump_ir: options.DumpDir = None,
    print_ir_after: options.PrintAfter = None,
    verify: options.Verify = "full",
    check_numerics: options.Numerics = False,
    as_json: options.AsJson = False,
) -> None:
    """Run passes over a program, as written."""
    from dataclasses import asdict

    import tfqc
    from tfqc.arguments import read_plan
    from tfqc.cli.progress import StderrProgress
    from tfqc.ir import render
    from tfqc.ir.rows import QuantPlan
    from tfqc.ir.store import check_place, load_program, save_program

    if out is not None:
        check_place(out)
    passes = tfqc.Pipeline.parse(options.read_pipeline(pipeline))
    context = tfqc.Context(
        schedule=None if schedule is None else options.read_schedule(schedule),
        calibration=None if calibration is None else options.read_calibration(calibration),
        seed=seed,
        plan=read_plan(plan, passes),
    )
    watchers, timing = options.instruments(
        verify=verify,
        numerics=check_numerics,
        reproducer=None if out is None else beside(out, "reproducer"),
        dump=dump_ir,
        print_after=print_ir_after,
        as_json=as_json,
    )
    loaded = load_program(program)
    if plan is not None:
        loaded.tables.pop(QuantPlan.table, None)
    # Nothing is written beside a program that is only read: without -o, trajectories are kept in the user's cache.
    work = nullcontext() if out is None else kept_work(beside(out, "work"))
    with work as context.workdir, StderrProgress() as context.progress:
        result = passes.run(loaded, context, watchers)
    if out is not None:
        save_program(result, out)
    for line in context.report:
        note(line)
    timings = [asdict(t) for t in timing.passes]
    value = {
        "out": None if out is None else str(out),
        "stage": str(result.stage),
        "tables": sorted(result.tables),
        "report": list(context.report),
        "passes": timings,
        **({"ir": render(result)} if out is None else {}),
    }
    text = render(result).rstrip("\n") if out is None else f"{passes_table(timings)}\n\n{out}: {result.stage}"
    show(value, text, as_json)
