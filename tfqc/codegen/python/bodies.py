"""Functions of a program as the bodies of Python functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from tfqc.codegen.python.expressions import DEVICE, Stored, expression, variable
from tfqc.codegen.python.fused import is_fused_dequantize, is_fused_quantize
from tfqc.codegen.python.names import harmless
from tfqc.codegen.python.wrapping import wrapped
from tfqc.ir.program import BEGIN, STEP, TIME, Program

DOCS = {
    STEP: "One timestep; `row` picks the rows of the tables.",
    BEGIN: "What is constant over one image, computed once.",
    TIME: "Temporal features in full precision, for timesteps that the tables do not hold.",
}


def body(
    program: Program,
    function: str,
    stored: Stored,
    write: Callable[[fx.Node], str] | None = None,
    fused: bool = True,
) -> Iterator[str]:
    """A line for each operation, below the name of the module that it comes from.

    Values are freed behind their last reader. What `stored` writes has no line of its own. write: the right-hand side
    of a line; the operation as torch has it if None. fused: quantize and dequantize are one line where they can be.
    """
    graph = program.functions[function]
    last = _last_reads(graph, fused)
    module = ""

    def has_line(node: fx.Node) -> bool:
        return node.op == "call_function" and stored(node) is None and not (fused and is_fused_quantize(node))

    if any(isinstance(item, torch.device) for node in graph.nodes for item in (*node.args, *node.kwargs.values())):
        yield f"    {DEVICE} = {variable(next(n for n in graph.nodes if n.op == 'placeholder'))}.device"
    for node in graph.nodes:
        if node.op == "output":
            yield f"    return {expression(node, stored)}"
        if not has_line(node):
            continue
        origin = program.origins.get(node.name)
        if origin and origin.module and origin.module != module:
            module = origin.module
            yield f"    # {harmless(module)}"
        free = [variable(n) for n in last.get(node, []) if has_line(n)]
        line = f"    {variable(node)} = {write(node) if write else expression(node, stored)}"
        yield from wrapped(line + (f"; del {', '.join(free)}" if free else ""))


def _last_reads(graph: fx.Graph, fused: bool) -> dict[fx.Node, list[fx.Node]]:
    """Values whose last reader is a node, by that node."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in _reads(node) if fused else node.all_input_nodes:
            last[operand] = node
    freed: dict[fx.Node, list[fx.Node]] = {}
    for operand, node in last.items():
        freed.setdefault(node, []).append(operand)
    return freed


def _reads(node: fx.Node) -> list[fx.Node]:
    """Operands of the line that a node becomes."""
    if is_fused_dequantize(node):
        return list(node.all_input_nodes[0].all_input_nodes)
    return [] if is_fused_quantize(node) else list(node.all_input_nodes)
