"""Names of operations, ATen's and ours, and what is known of them by name."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError
from tfqc.runtime import kernel_ops, ops

DEFINED = (ops, kernel_ops)  # which registers the operations that the IR names tfqc.*

# Operations that read only the shape of their first argument, never its values.
SHAPE_ONLY = {
    "aten.sym_size.int", "aten.sym_numel.default", "aten.sym_stride.int", "aten.zeros_like.default",
    "aten.ones_like.default", "aten.empty_like.default", "aten.full_like.default", "aten.new_zeros.default",
    "aten.new_ones.default", "aten.new_full.default", "aten.new_empty.default",
}  # fmt: skip


def works_in_place(target: Any) -> bool:
    """True for an operation that changes an operand, so that it matters even if nothing reads its result."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


# Views that ATen may also answer with a copy; behind kernels they never need one.
_VIEWS = {"aten.reshape.default", "aten.flatten.using_ints", "operator.getitem"}


def is_view(node: fx.Node) -> bool:
    """True for an operation whose result lies in the memory of its first operand."""
    if node.op != "call_function" or op_name(node.target) in _VIEWS:
        return node.op == "call_function"
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def op_name(target: Any) -> str:
    """The name that the IR text gives an operation: `aten.linear.default`, `operator.getitem`, `math.floor`."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module in ("_operator", "operator"):
        return f"operator.{name}"
    if module in ("torch", "math") and name:
        return f"{module}.{name}"
    raise IRError(f"{target!r} is not an operation that the IR knows: only ATen, tfqc and Python operators are.")


def op_by_name(name: str) -> Any:
    """Inverse of `op_name`.

    Raises:
        IRError: nothing of that name exists.
    """
    import math

    head, _, rest = name.partition(".")
    try:
        if head == "operator":
            return getattr(operator, rest)
        if head in ("torch", "math"):
            return getattr(torch if head == "torch" else math, rest)
        packet, _, overload = rest.partition(".")
        return getattr(getattr(getattr(torch.ops, head), packet), overload or "default")
    except (AttributeError, RuntimeError) as error:
        raise IRError(f"No operation {name!r} exists.") from error
