"""Planning: the one place that chooses, from a user's options, what is quantized and to what.

`plan-quantization` plans all in its scope. Passes that find parameters plan by the same functions, from options of
their own, what nothing is planned for when they run; so a pipeline may do without `plan-quantization`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import fx

from tfqc.analysis.binding import Roles, binding_times, edge_nodes
from tfqc.analysis.skipping import skipped
from tfqc.analysis.weighted import is_linear
from tfqc.errors import PassError
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import QuantPlan, Tib
from tfqc.ir.views import Linear
from tfqc.passing.base import Pass
from tfqc.passing.context import Context
from tfqc.passing.spec import changed_options
from tfqc.quant.formats import FLOAT, QuantSpec, Specs, integer
from tfqc.quant.parameters import has_rows
from tfqc.quant.plan import planned, set_planned
from tfqc.quant.plan_text import bind_plan
from tfqc.quant.step_policy import StepPolicy, parts_of

Scope = Literal["all", "tib", "linear"]
PLANNER = "plan-quantization"
# Options of passes by which they plan; `plan-quantization` has them where it is there.
_CHOOSING = {"bits", "method", "mode", "group", "symmetric", "edge-bits", "scope", "skip", "intervals"}

# By the beginning of a reason that `plan` gives.
_UNDOING = {
    "edges=": "say edges=none",
    "skip": "leave skip out",
    "weights=none": "give weights bits",
    "activations=none": "give activations bits",
    "first-steps=": "leave first-steps out",
    "last-steps=": "leave last-steps out",
    "reasoner=": "say reasoner=native",
}


@dataclass(frozen=True)
class Weights:
    """Options for weights: `bits`, None = left in floating point; `edges`, bits of the model's first and last layer,
    None = as the others; the range search; `group` columns that share a scale, None = per channel, of all weights or
    of those of linears and convolutions of 1 x 1 alone."""

    operand: ClassVar[str] = "weight"
    none: ClassVar[str] = "weights=none"
    bits: int | None
    method: Literal["min-max", "mse"] = "min-max"
    group: int | None = None
    group_scope: Literal["all", "linear"] = "all"
    symmetric: bool = True
    edges: int | None = None

    def spec(self, program: Program, node: fx.Node, roles: Roles, bits: int) -> tuple[QuantSpec, str]:
        """The spec of a node's weight, and why it is not as that of others."""
        grouped = self.group is not None and (self.group_scope == "all" or is_linear(program, node))
        spec = QuantSpec(
            format=integer(bits),
            per="group" if grouped else "channel",
            group=self.group or 0 if grouped else 0,
            symmetric=self.symmetric,
            range=self.method,
        )
        return spec, "group-scope=linear" if self.group and not grouped else ""


@dataclass(frozen=True)
class Inputs:
    """Options for inputs: bits and edges as for weights; the range search; what has a scale: the tensor, each step of
    the schedule (in `intervals` rows, 0 = one a step), each token. Where a step or a token cannot have one, the next
    best has: convolutions per step, what waits for no step per tensor. `policy`: steps that are protected."""

    operand: ClassVar[str] = "input"
    none: ClassVar[str] = "activations=none"
    bits: int | None
    method: Literal["min-max", "mse", "fsc", "tdq"] = "min-max"
    mode: Literal["static", "per-step", "per-token"] = "static"
    intervals: int = 0
    edges: int | None = None
    policy: StepPolicy = field(default_factory=StepPolicy)

    def spec(self, program: Program, node: fx.Node, roles: Roles, bits: int) -> tuple[QuantSpec, str]:
        """The spec of a node's input, and why it is not as that of others."""
        per_token = self.mode == "per-token"
        if per_token and Linear.of(node):
            return QuantSpec(format=integer(bits), per="token", symmetric=False), ""
        # What waits for nothing but the request runs once per image, where there are no steps; in finite-set
        # calibration of the block, its rows are one for each step all the same.
        waits = bool(roles & {Role.SAMPLE, Role.TIME}) or (self.method == "fsc" and node.name in program.table(Tib))
        timed = bool(program.input(Role.TIME))  # else no step is known by its time
        per_step = self.mode != "static" and timed and waits and has_rows(program, node.all_input_nodes[0])
        spec = QuantSpec(
            format=integer(bits),
            per="step" if per_step else "tensor",
            intervals=self.intervals if per_step else 0,
            symmetric=False,
            range=self.method,
        )
        if per_step or self.mode == "static":
            return spec, "per token is for linears" if per_token else ""
        why = "it has no batch" if waits else "it waits for no step"
        return spec, why if timed else "no time is known"

    def parts(self, program: Program, node: fx.Node, roles: Roles, spec: QuantSpec, steps: int) -> Specs:
        """A spec for each part of a schedule of so many steps: protected steps stay in floating point."""
        by = spec.by
        if not roles & {Role.SAMPLE, Role.TIME}:
            protected = self.policy.reasoner == "a16"
            return (QuantSpec(format=FLOAT, by=by, why="reasoner=a16") if protected else spec,)
        found = parts_of(self.policy.protects(steps))
        if not any(mark for _, _, mark in found) or not program.input(Role.TIME):
            return (spec,)
        if not has_rows(program, node.all_input_nodes[0]):  # one value for images of several steps
            return (spec,)
        kept = QuantSpec(format=FLOAT, by=by, why=f"first-steps={self.policy.first_steps}")
        last = replace(kept, why=f"last-steps={self.policy.last_steps}")
        if len(found) == 1:
            return (kept if self.policy.first_steps else last,)
        return tuple(
            replace((kept if start < self.policy.first_steps else last) if mark else spec, steps=(start, stop))
            for start, stop, mark in found
        )


def plan(
    program: Program,
    ctx: Context,
    item: Pass,
    options: Weights | Inputs,
    nodes: Iterable[fx.Node],
    *,
    scope: Scope = "all",
    skip: tuple[str, ...] = (),
) -> None:
    """Plan one operand of those of `nodes` that options choose, where nothing is planned for it yet.

    `item` is the pass that has the options. What `plan-quantization` skips stays in floating point; what another pass
    skips may be planned by the next.

    Raises:
        SpecError: a line of `ctx.plan` is not for this program.
        PassError: `skip` names nothing; or options of another pass have nothing to say, since `plan-quantization` has
            planned all that they choose.
    """
    start_plan(program, ctx)
    left = skipped(program, skip)
    chosen = [n for n in nodes if _in_scope(program, n, scope)]
    chosen = [n for n in chosen if item.name == PLANNER or n not in left]
    todo = [n for n in chosen if not planned(program, n, options.operand)]
    if not todo:
        _refuse_unheard(program, item, options.operand, chosen)
        return
    roles = binding_times(program)
    edges = edge_nodes(program) if options.edges is not None else []
    for node in todo:
        if options.bits is None or node in left:
            reason = options.none if options.bits is None else "skip"
            spec = QuantSpec(format=FLOAT, by=item.name, why=reason)
        else:
            bits = options.edges if options.edges is not None and node in edges else options.bits
            found, why = options.spec(program, node, roles[node.name], bits)
            reasons = ["tib" if scope == "tib" else "", f"edges={bits}" if bits != options.bits else "", why]
            spec = replace(found, by=item.name, why=", ".join(filter(None, reasons)))
        specs = (spec,)
        if isinstance(options, Inputs) and spec.is_quantized:
            specs = options.parts(program, node, roles[node.name], spec, len(ctx.schedule or ()))
        set_planned(program, node, options.operand, specs)


def undoing(why: str) -> str:
    """What would plan an operand as the others, where the reason `why` is an option; empty if it is none."""
    for reason in why.split(", "):
        for option, advice in _UNDOING.items():
            if reason.startswith(option):
                return advice
    return ""


def start_plan(program: Program, ctx: Context) -> None:
    """Make the table `plan`, of what a person wrote, if it is not there.

    Raises:
        SpecError: a line that is not for this program.
    """
    if QuantPlan.table not in program.tables:
        steps = None if ctx.schedule is None else len(ctx.schedule)
        program.set_table(QuantPlan, bind_plan(program, ctx.plan, steps) if ctx.plan else {})


def _in_scope(program: Program, node: fx.Node, scope: Scope) -> bool:
    return scope == "all" or (node.name in program.table(Tib) if scope == "tib" else is_linear(program, node))


def _refuse_unheard(program: Program, item: Pass, operand: str, chosen: list[fx.Node]) -> None:
    """Refuse options that would plan what `plan-quantization` has planned."""
    given = [name for name in changed_options(item) if name in _CHOOSING]
    if item.name == PLANNER or not given or not chosen:
        return
    if all(spec.by == PLANNER for node in chosen for spec in planned(program, node, operand)):
        raise PassError(
            f"{item} finds parameters for what {PLANNER} has planned, which is the {operand} of every layer that these "
            f"options choose: give {', '.join(given)} to {PLANNER}."
        )
