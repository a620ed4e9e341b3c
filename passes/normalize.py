"""normalize: what torch.export leaves becomes a flat, functional graph without anything that computes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.frontend.canonical import make_canonical
from tfqc.ir.infer import infer_type
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.verify import is_assertion
from tfqc.passing import EXACT, Numerics, Pass

# Return their first operand whenever the type stays the same.
_SAME_IF_TYPE_IS = {
    "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten._to_copy.default", "aten.type_as.default",
    "aten.expand.default", "aten.view.default", "aten.reshape.default", "aten.alias.default", "aten.detach.default",
    "aten.clone.default", "aten.lift_fresh_copy.default", "aten.to.other",
}  # fmt: skip
_COPIES = {"aten.clone.default", "aten._to_copy.default", "aten.lift_fresh_copy.default"}
_DROPOUTS = {"aten.dropout.default", "aten.feature_dropout.default"}


@dataclass(frozen=True)
class Normalize(Pass):
    """Remove assertions, in-place operations, identities and dead nodes; let created tensors say their sizes, and
    products with stored weights be `linear` and `conv2d`.

    Refuses operations in place whose target is an input, or is shared with a view: that effect is not visible in
    the graph.
    """

    name: ClassVar[str] = "normalize"
    reaches: ClassVar[Stage] = Stage.NORMALIZED
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: object) -> None:
        """Rewrite @step."""
        for node in program.nodes():
            if is_assertion(node):
                program.step.erase_node(node)
        # Aliases go before operations in place are rewritten, which then need not know them; copies go after.
        _remove_identities(program, only_aliases=True)
        for node in program.nodes():
            if node.op == "call_function":
                _functionalize(program, node)
        _remove_identities(program, only_aliases=False)
        transposed: dict[str, str] = {}
        for node in program.nodes():
            if node.op == "call_function":
                _create_by_size(program, node)
                make_canonical(program, node, transposed)
        program.prune()
        program.origins = {name: origin for name, origin in program.origins.items() if origin.module or origin.source}


def _remove_identities(program: Program, only_aliases: bool) -> None:
    for node in program.nodes():
        if node.op != "call_function" or (only_aliases and not _is_alias(program, node)):
            continue
        if (same := _identity(program, node)) is not None:
            program.replace(node, same)


def _functionalize(program: Program, node: fx.Node) -> None:
    """Replace an operation in place by its functional form, and later reads of its target by the result."""
    if not works_in_place(node.target):
        return
    name = op_name(node.target)
    packet, _, overload = name.removeprefix("aten.").partition(".")
    functional = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), overload, None)
    victim = node.args[0] if node.args else None
    if not packet.endswith("_") or functional is None or not isinstance(victim, fx.Node):
        raise PassError(f"{program.at(node)}: {name} works in place and has no functional form that tfqc knows.")
    earlier = [u for u in victim.users if u < node and _is_alias(program, u)]
    if victim.op != "call_function" or _is_alias(program, victim) or earlier:
        raise PassError(
            f"{program.at(node)}: {name} changes a value that others share; write the model without it there."
        )
    node.target = functional
    result = node
    if (promoted := infer_type(program, node)) != program.type(victim):  # in place, the target keeps its dtype
        program.types[node.name] = promoted
        dtype = program.tensor_type(victim).dtype  # type: ignore[union-attr]
        result = program.insert(node.next, torch.ops.aten.to.dtype, (node, dtype), like=node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not result)
    for later in [user for user in victim.users if node < user]:
        later.replace_input_with(victim, result)


def _is_alias(program: Program, node: fx.Node) -> bool:
    """True for a view, and for what may return its operand itself."""
    if node.op != "call_function":
        return False
    name = op_name(node.target)
    if name == "operator.getitem":  # one of the views that `chunk` makes
        return _is_alias(program, node.args[0])  # type: ignore[arg-type]
    if name in _COPIES:
        return False
    if name.startswith("aten.to."):  # a copy for another type, or when asked for one
        asked = True in node.args[3:] or node.kwargs.get("copy")
        return not asked and program.type(node) == program.type(node.all_input_nodes[0])
    returns = getattr(getattr(node.target, "_schema", None), "returns", ())
    return name in _DROPOUTS or any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


_CREATIONS = {"zeros": 0, "ones": 1, "empty": 0, "full": None}


def _create_by_size(program: Program, node: fx.Node) -> None:
    """`zeros_like(x)`, `x.new_ones(...)` and such read no value of x: let them say their size, and not read x."""
    packet = op_name(node.target).removeprefix("aten.").partition(".")[0]
    kind = packet.removesuffix("_like").removeprefix("new_")
    type_ = program.tensor_type(node)
    if kind == packet or kind not in _CREATIONS or type_ is None:
        return
    like = node.args[0]
    assert isinstance(like, fx.Node)
    value: Any = _CREATIONS[kind]
    if value is None:
        value = node.args[-1] if len(node.args) > 1 else node.kwargs["fill_value"]
    sizes: list[Any] = list(type_.shape if packet.endswith("_like") else node.args[1])  # type: ignore[arg-type]
    for dim, size in enumerate(sizes):
        if isinstance(size, str):
            sizes[dim] = program.insert(node, torch.ops.aten.sym_size.int, (like, dim))
    node.target = torch.ops.aten.full.default
    node.args = (sizes, value)
    node.kwargs = {"dtype": type_.dtype, "device": torch.device("cpu"), "pin_memory": False}


def _identity(program: Program, node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged, if it does."""
    name, args = op_name(node.target), node.args
    first = args[0] if args else None
    if not isinstance(first, fx.Node):
        return None
    if name in _SAME_IF_TYPE_IS and program.type(node) == program.type(first):
        # A copy may be there for its strides: what views it needs them.
        return None if name in _COPIES and (node.kwargs.get("memory_format") or _is_alias(program, first)) else first
    if name in _DROPOUTS and (args[1] == 0.0 or args[2] is False):
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
    filled: tuple[Any, ...] = (*args, *(0, 0, None, None, 1)[len(args) :])
    _, dim, start, end, step = filled
    if type_ is None or start not in (0, None) or step != 1:
        return False
    extent = type_.shape[dim]
    return end is None or (isinstance(end, int) and (end == 2**63 - 1 or (isinstance(extent, int) and end >= extent)))


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, number, rel_tol=0, abs_tol=0)


def _floating(program: Program, node: fx.Node) -> bool:
    type_ = program.tensor_type(node)
    return isinstance(type_, TensorType) and type_.dtype.is_floating_point
