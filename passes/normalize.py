"""normalize: what torch.export leaves becomes a flat, functional graph without anything that computes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.frontend.batch_norms import batch_norm_rules, has_batch_norms
from tfqc.frontend.canonical import canonical_rules
from tfqc.frontend.functional import CASTS, COPIES, DROPOUTS, functionalize, is_alias
from tfqc.frontend.widen import has_half_weights, widen
from tfqc.ir.calls import canonical
from tfqc.ir.edit import Rewriter, rewrite
from tfqc.ir.match import is_call
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.verify import is_assertion
from tfqc.passing import EXACT, LOSSY, Numerics, Pass, close

aten = torch.ops.aten
# Return their first operand whenever the type stays the same.
_SAME_IF_TYPE_IS = (
    *CASTS, *COPIES, aten.type_as.default, aten.expand.default, aten.view.default, aten.reshape.default,
    aten.alias.default, aten.detach.default,
)  # fmt: skip


@dataclass(frozen=True)
class Normalize(Pass):
    """Name all operands; remove assertions, in-place operations, identities and dead nodes.

    Created tensors say their sizes, and products with stored weights become `linear` and `conv2d`, batch norms behind
    them included. A model with weights in f16 or bf16 is computed in f32 from here on.

    Refuses operations in place on inputs and on the model's tensors: that effect is not visible in the graph.
    """

    name: ClassVar[str] = "normalize"
    reaches: ClassVar[Stage] = Stage.NORMALIZED
    numerics: ClassVar[Numerics] = EXACT

    def moves(self, program: Program) -> Numerics:
        """Nothing, unless batch norms become part of layers, or what was rounded to half precision is not any more."""
        if has_half_weights(program):
            return LOSSY
        return close(1e-5) if has_batch_norms(program) else self.numerics

    def run(self, program: Program, ctx: object) -> None:
        """Rewrite @step."""
        edit = Rewriter(program)
        for node in program.nodes():
            if is_assertion(node):
                program.step.erase_node(node)
            elif is_call(node):
                node.args, node.kwargs = canonical(node.target, node.args, node.kwargs)
        if has_half_weights(program):
            widen(program)
        # Aliases go before operations in place are rewritten, which then need not know them; copies go after.
        _remove_identities(edit, only_aliases=True)
        functionalize(edit)
        _remove_identities(edit, only_aliases=False)
        for node in program.nodes():
            if is_call(node):
                _create_by_size(edit, node)
                _leave_out_nothing(edit, node)
        program.prune()
        rewrite(program, canonical_rules() + batch_norm_rules())
        program.origins = {name: origin for name, origin in program.origins.items() if origin.module or origin.source}


def _remove_identities(edit: Rewriter, only_aliases: bool) -> None:
    for node in edit.program.nodes():
        if not is_call(node) or (only_aliases and not is_alias(edit.program, node)):
            continue
        if (same := _identity(edit.program, node)) is not None:
            edit.program.replace(node, same)


_CREATIONS = {"zeros": 0, "ones": 1, "empty": 0, "full": None}


def _create_by_size(edit: Rewriter, node: fx.Node) -> None:
    """`zeros_like(x)`, `x.new_ones(...)` and such read no value of x: let them say their size, and not read x."""
    program, given = edit.program, node.kwargs
    packet = op_name(node.target).removeprefix("aten.").partition(".")[0]
    kind = packet.removesuffix("_like").removeprefix("new_")
    type_ = program.tensor_type(node)
    if kind == packet or kind not in _CREATIONS or type_ is None:
        return
    like: Any = given["self"]
    value = given["fill_value"] if _CREATIONS[kind] is None else _CREATIONS[kind]
    sizes: list[Any] = list(type_.shape if packet.endswith("_like") else given["size"])  # type: ignore[arg-type]
    for dim, size in enumerate(sizes):
        if isinstance(size, str):
            sizes[dim] = edit.insert(node, aten.sym_size.int, like, dim)
    made = {"dtype": type_.dtype, "device": torch.device("cpu"), "pin_memory": False}
    edit.become(node, aten.full.default, size=sizes, fill_value=value, **made)


def _leave_out_nothing(edit: Rewriter, node: fx.Node) -> None:
    """A concatenation does without parts that hold nothing: layers that compute them have no values to calibrate on."""
    if not is_call(node, aten.cat.default):
        return
    parts: Any = node.kwargs["tensors"]
    types = [edit.program.tensor_type(part) for part in parts]
    whole, result = [t for t in types if t and 0 not in t.shape], edit.program.tensor_type(node)
    if 0 < len(whole) < len(parts) and result and all(t.dtype == result.dtype for t in whole):
        left = [part for part, t in zip(parts, types, strict=True) if t and 0 not in t.shape]
        edit.update(node, tensors=left)


def _identity(program: Program, node: fx.Node) -> fx.Node | None:
    """The operand that a node returns unchanged, if it does."""
    given = node.kwargs
    first = next(iter(given.values()), None)
    if not isinstance(first, fx.Node):
        return None
    if is_call(node, *_SAME_IF_TYPE_IS) and program.type(node) == program.type(first):
        # A copy may be there for its strides: what views it needs them.
        ordered = is_call(node, *COPIES) and (given.get("memory_format") or is_alias(program, first))
        return None if ordered else first
    if is_call(node, *DROPOUTS) and (given["p"] == 0.0 or given["train"] is False):
        return first
    if is_call(node, aten.slice.Tensor) and _whole(program, first, given):
        return first
    number = given.get("other")
    if is_call(node, aten.div.Tensor, aten.mul.Tensor) and _is_number(number, 1) and _floating(program, first):
        return first
    # x + 0.0 turns -0.0 into 0.0, so it is no identity for bits; x - 0.0 is.
    is_same = is_call(node, aten.sub.Tensor) and _is_number(number, 0) and _floating(program, first)
    return first if is_same else None


def _whole(program: Program, first: fx.Node, given: Any) -> bool:
    type_, end = program.tensor_type(first), given["end"]
    if type_ is None or given["start"] not in (0, None) or given["step"] != 1:
        return False
    extent = type_.shape[given["dim"]]
    return end is None or (isinstance(end, int) and (end == 2**63 - 1 or (isinstance(extent, int) and end >= extent)))


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, number, rel_tol=0, abs_tol=0)


def _floating(program: Program, node: fx.Node) -> bool:
    type_ = program.tensor_type(node)
    return isinstance(type_, TensorType) and type_.dtype.is_floating_point
