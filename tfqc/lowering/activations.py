"""Activation functions in graphs."""

from __future__ import annotations

from torch import fx

from tfqc.analysis.rewrite import name_of, only_reader
from tfqc.ir.program import Program


def gelu_kind(node: fx.Node) -> str:
    """The activation that an aten.gelu computes."""
    return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"


def geglu_end(program: Program, chunk: fx.Node) -> fx.Node | None:
    """The product of value and gelu(gate), where that is all that becomes of the two halves of a last dimension."""
    type_ = program.tensor_type(chunk.args[0])  # type: ignore[arg-type]
    if type_ is None or chunk.args[1] != 2 or chunk.args[2:] not in ((-1,), (len(type_.shape) - 1,)):
        return None
    halves = {n.args[1]: n for n in chunk.users if name_of(n) == "operator.getitem"}
    if len(chunk.users) != 2 or set(halves) != {0, 1}:
        return None
    gelu, end = only_reader(halves[1]), only_reader(halves[0])
    if name_of(gelu) != "aten.gelu.default" or name_of(end) != "aten.mul.Tensor":
        return None
    assert gelu is not None and end is not None
    return end if only_reader(gelu) is end and gelu_kind(gelu) == "gelu" else None
