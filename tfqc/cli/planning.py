"""The plan for quantization that a command shows: a program's own, or what would be planned for a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tfqc.passing.pipeline import Pipeline


def plan_of(what: str, target: str, strategy: str, pipeline: str | None) -> str:
    """The plan as text.

    Args:
        what: a program's file, or a model's name.
        target, strategy, pipeline: what it would be compiled for, and how.

    Raises:
        TfqcError: there is no such thing, or nothing of it is planned.
    """
    from tfqc.arguments import read_pipeline, read_target
    from tfqc.cli.options import read_pipeline as read_file
    from tfqc.frontend import capture
    from tfqc.ir.program import Stage
    from tfqc.ir.rows import QuantPlan
    from tfqc.ir.store import load_program
    from tfqc.models.find import find_model
    from tfqc.passing.context import Context
    from tfqc.quant.plan_text import plan_to_text

    text = None if pipeline is None else read_file(pipeline)
    passes = read_pipeline(text, read_target(target), strategy)
    if Path(what).is_file():
        program = load_program(Path(what))
    else:
        spec = find_model(what)
        program = capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name, dynamic=spec.dynamic)
    if QuantPlan.table not in program.tables:
        _planning(passes, program.stage is not Stage.CAPTURED).run(program, Context())
    return plan_to_text(program)


def _planning(passes: Pipeline, begun: bool) -> Pipeline:
    """The passes of a pipeline up to the last that plans; of them those that plan, for a program beyond capture."""
    from tfqc.errors import PipelineError
    from tfqc.passing.pipeline import Pipeline

    at = [number for number, item in enumerate(passes.passes, 1) if item.name == "plan-quantization"]
    if not at:
        raise PipelineError("The pipeline has no plan-quantization: other passes plan when they run, with their data.")
    found = passes.passes[: at[-1]]
    return Pipeline(tuple(item for item in found if item.name == "plan-quantization") if begun else found)
