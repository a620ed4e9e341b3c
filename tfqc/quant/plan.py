"""The table `plan`: what it says of a node's operand, and what of that passes can do."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tfqc.analysis.weighted import is_weighted
from tfqc.errors import PassError, SpecError
from tfqc.ir.program import TIME, Program
from tfqc.ir.rows import QuantPlan
from tfqc.ir.views import Linear
from tfqc.quant.formats import QuantSpec, Specs, specs_of_text, specs_to_text
from tfqc.quant.parameters import has_rows


def planned(program: Program, node: fx.Node, operand: str) -> Specs:
    """What an operand is to be quantized to; empty if nothing is planned for it.

    Raises:
        PassError: the table holds text that is no plan.
    """
    row = program.table(QuantPlan).get(node.name)
    if row is None or operand not in row.operands:
        return ()
    try:
        return specs_of_text(row.operands[operand])
    except SpecError as error:
        raise PassError(f"The plan for the {operand} of {program.at(node)} cannot be read: {error}") from error


def is_float(program: Program) -> bool:
    """True where all layers that run at a step or once a request are planned, and all of them in floating point."""
    layers = [n for f in program.functions if f != TIME for n in program.nodes(f) if is_weighted(n)]
    found = [planned(program, n, operand) for n in layers for operand in ("weight", "input")]
    return bool(found) and all(specs and not any(s.is_quantized for s in specs) for specs in found)


def set_planned(program: Program, node: fx.Node, operand: str, specs: Specs) -> None:
    """Plan an operand, instead of what was planned for it."""
    rows = program.tables.setdefault(QuantPlan.table, {})
    row = rows.get(node.name)
    others = dict(row.operands) if isinstance(row, QuantPlan) else {}
    rows[node.name] = QuantPlan({**others, operand: specs_to_text(specs)})


def fillable(program: Program, node: fx.Node, operand: str, by: str) -> QuantSpec | None:
    """The spec of an operand that a pass is to find parameters for; None if it stays in floating point.

    Raises:
        PassError: it is planned as no pass can do yet; `by` is the pass that says so.
    """
    specs = planned(program, node, operand)
    if not any(spec.is_quantized for spec in specs):
        return None
    spec = next(spec for spec in specs if spec.is_quantized)
    if why := _why_not(specs, operand) or (_why_not_weight if operand == "weight" else _why_not_input)(
        program, node, spec
    ):
        raise PassError(
            f"The {operand} of {program.at(node)} is planned as {specs_to_text(specs)}, which {by} cannot do: {why}."
        )
    return spec


def protected_steps(program: Program, node: fx.Node, operand: str) -> list[bool]:
    """Of each step of the schedule, whether an operand stays in floating point there; empty where all are alike."""
    specs = sorted(planned(program, node, operand), key=lambda spec: spec.steps or (0, 0))
    parts = [(spec.steps, not spec.is_quantized) for spec in specs if spec.steps is not None]
    return [protected for (start, stop), protected in parts for _ in range(start, stop)]


def _why_not(specs: Specs, operand: str) -> str:
    """Why no pass quantizes an operand so; empty if some do."""
    if any(spec.channels for spec in specs):
        return "no pass splits an operand along its channels"
    alike = {replace(spec, steps=None, by="", why="") for spec in specs if spec.is_quantized}
    if any(spec.steps for spec in specs) and (operand != "input" or len(alike) > 1):
        return "no pass quantizes an operand otherwise at other steps, but an input may be float at some of them"
    spec = next(iter(alike))
    if not spec.format.is_integer:
        return f"passes quantize to integers, and {spec.format.name} is none"
    return "no pass divides an operand by smoothing factors" if spec.smooth else ""


def _why_not_weight(program: Program, node: fx.Node, spec: QuantSpec) -> str:
    if spec.per not in ("channel", "group"):
        return f"a weight has a scale for each channel or group, not per={spec.per}"
    return f"finite sets (range={spec.range}) are for inputs" if spec.range in ("fsc", "tdq") else ""


def _why_not_input(program: Program, node: fx.Node, spec: QuantSpec) -> str:
    if spec.symmetric:
        return "codes of inputs are 0 .. 2^bits - 1: say symmetric=false"
    if spec.per not in ("tensor", "token", "step"):
        return f"an input has one scale, or one for each token or step, not per={spec.per}"
    if spec.per == "token" and Linear.of(node) is None:
        return "per=token is for linears"
    timed = spec.per == "step" or spec.steps is not None
    if timed and not has_rows(program, node.all_input_nodes[0]):
        return "steps are of inputs whose first dimension is the batch"
    return ""
