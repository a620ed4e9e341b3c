"""normalize: what torch.export leaves becomes a flat, functional graph without anything that computes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.verify import is_assertion
from tfqc.passing import EXACT, Numerics, Pass

# Return their first operand whenever the type stays the same.
_SAME_IF_TYPE_IS = {
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.type_as.default",
    "aten.expand.default", "aten.view.default", "aten.reshape.default", "aten.alias.default", "aten.detach.default",
    "aten.detach_.default", "aten.clone.default", "aten.lift_fresh_copy.default", "aten.to.other",
}  # fmt: skip


@dataclass(frozen=True)
class Normalize(Pass):
    """Remove assertions, in-place operations, identities and dead nodes.

    Refuses operations in place whose target is a view: their effect is not visible in the graph.
    """

    name: ClassVar[str] = "normalize"
    reaches: ClassVar[Stage] = Stage.NORMALIZED
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: object) -> None:
        """Rewrite @step."""
        for node in program.nodes():
            if is_assertion(node):
                program.step.erase_node(node)
        for node in program.nodes():
            if node.op == "call_function":
                _functionalize(program, node)
        for node in program.nodes():
            if node.op == "call_function" and (same := _identity(program, node)) is not None:
                program.replace(node, same)
        program.prune()
        program.origins = {
            name: origin for name, origin in program.origins.items() if origin.module or origin.source
        }


def _functionalize(program: Program, node: fx.Node) -> None:
    """Replace an operation in place by its functional form, and later reads of its target by the result."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return
    name = op_name(target)
    packet, _, overload = name.removeprefix("aten.").partition(".")
    functional = getattr(torch.ops.aten, packet.removesuffix("_"), None)
    victim = node.args[0]
    if not packet.endswith("_") or functional is None or not isinstance(victim, fx.Node):
        raise PassError(f"{program.at(node)}: {name} works in place and has no functional form that tfqc knows.")
    if victim.op != "call_function" or _is_view(victim) or any(_is_view(u) for u in victim.users):
        raise PassError(
            f"{program.at(node)}: {name} changes a value that others share; write the model without it there."
        )
    node.target = getattr(functional, overload)
    passed = False
    for later in program.nodes():
        passed = passed or later is node
        if passed and later is not node:
            later.replace_input_with(victim, node)


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and any(
        r.alias_info is not None and not r.alias_info.is_write
        for r in getattr(getattr(node.target, "_schema", None), "returns", ())
    )


def _identity(program: Program, node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged, if it does."""
    name, args = op_name(node.target), node.args
    first = args[0] if args else None
    if not isinstance(first, fx.Node):
        return None
    if name in _SAME_IF_TYPE_IS and program.type(node) == program.type(first):
        return first
    if name in ("aten.dropout.default", "aten.feature_dropout.default") and (args[1] == 0.0 or args[2] is False):
        return first
    if name == "aten.slice.Tensor" and _whole(program, first, args):
        return first
    if name in ("aten.div.Tensor", "aten.mul.Tensor") and _is_number(args[1], 1) and _floating(program, first):
        return first
    if name in ("aten.add.Tensor", "aten.sub.Tensor") and _is_number(args[1], 0) and _floating(program, first):
        # x + 0.0 turns -0.0 into 0.0, so it is no identity for bits; x - 0.0 is.
        return first if name == "aten.sub.Tensor" else None
    return None


def _whole(program: Program, first: fx.Node, args: tuple[Any, ...]) -> bool:
    type_ = program.tensor_type(first)
    _, dim, start, end, step = (*args, *(0, 0, None, None, 1)[len(args) :])
    if type_ is None or start not in (0, None) or step != 1:
        return False
    extent = type_.shape[dim]
    return end is None or (isinstance(end, int) and (end == 2**63 - 1 or (isinstance(extent, int) and end >= extent)))


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, number, rel_tol=0, abs_tol=0)


def _floating(program: Program, node: fx.Node) -> bool:
    type_ = program.tensor_type(node)
    return isinstance(type_, TensorType) and type_.dtype.is_floating_point
