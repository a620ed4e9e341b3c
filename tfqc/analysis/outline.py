"""Taking a part of @step out into a function of its own: partial evaluation by binding time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.ir.ops import SHAPE_ONLY, op_name
from tfqc.ir.program import Program, Role
from tfqc.ir.types import ScalarType


def outline(program: Program, outputs: Iterable[fx.Node], roles: set[Role]) -> fx.Graph:
    """A new function that computes `outputs` (nodes of one function) from the inputs that have `roles`.

    The program is not changed. Nodes keep their names. Sizes that were read off the sample are read off an input of
    the new function that has the same symbol. Returns a tuple of the outputs.

    Raises:
        PassError: an output depends on an input of another role.
    """
    wanted = list(outputs)
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            if not (node.op == "call_function" and op_name(node.target) in SHAPE_ONLY):
                stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = [i for i in program.inputs if i.role in roles]
    # All inputs of the roles are parameters, read or not: the caller need not know which are.
    given = {i.name: graph.placeholder(i.name) for i in inputs}
    program.types.update({i.name: i.type for i in inputs})
    source = wanted[0].graph if wanted else program.step
    ordered = [n for n in source.nodes if n in needed]
    for node in [n for n in ordered if n.op == "get_attr"]:
        mapping[node] = graph.create_node("get_attr", node.target, name=node.name)
    sizes: dict[str, fx.Node] = {}
    for node in ordered:
        if node.op == "placeholder":
            if node.name not in given:
                raise PassError(f"{program.at(wanted[0])} depends on %{node.name}, which is not there at that time.")
            mapping[node] = given[node.name]
        elif node.op == "call_function" and op_name(node.target) in SHAPE_ONLY:
            mapping[node] = _shape(program, graph, node, given, sizes, mapping)
        elif node.op == "call_function":
            args = fx.map_arg(node.args, lambda n: mapping[n])
            kwargs = fx.map_arg(node.kwargs, lambda n: mapping[n])
            mapping[node] = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
    graph.output(tuple(mapping[n] for n in wanted))
    return graph


def _shape(
    program: Program,
    graph: fx.Graph,
    node: fx.Node,
    given: dict[str, fx.Node],
    sizes: dict[str, fx.Node],
    mapping: dict[fx.Node, fx.Node],
) -> fx.Node:
    """The counterpart of a node that reads a shape."""
    type_ = program.types[node.name]
    if isinstance(type_, ScalarType) and type_.value is not None:
        if type_.value not in sizes:
            sizes[type_.value] = _size(program, graph, node, type_.value, given)
        return sizes[type_.value]
    if any(n not in mapping for n in node.all_input_nodes):
        raise PassError(f"{program.at(node)} takes its shape from a value that is not there at that time.")
    args = fx.map_arg(node.args, lambda n: mapping[n])
    return graph.create_node("call_function", node.target, args, dict(node.kwargs), name=node.name)


def _size(program: Program, graph: fx.Graph, node: fx.Node, symbol: str, given: dict[str, fx.Node]) -> fx.Node:
    # Off the timesteps, if they are there: the other inputs need not be, where their values are not read.
    for item in sorted(program.inputs, key=lambda i: i.role is not Role.TIME):
        parameter, type_, name = given.get(item.name), item.type, item.name
        if parameter is not None and symbol in type_.shape:
            made = graph.call_function(torch.ops.aten.sym_size.int, (parameter, type_.shape.index(symbol)))
            made.name = graph._graph_namespace.create_name(f"size_{name}_{type_.shape.index(symbol)}", made)
            program.types[made.name] = ScalarType("int", symbol)
            return made
    raise PassError(f"{program.at(node)} needs the size {symbol}, which only the sample has.")
