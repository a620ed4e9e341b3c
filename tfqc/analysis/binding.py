"""Binding times (tfqc/README.md): which inputs a value depends on, by data flow over the function, never by names."""

from __future__ import annotations

import networkx as nx
import torch
from torch import fx

from tfqc.analysis.weighted import weighted_nodes
from tfqc.ir.match import is_call
from tfqc.ir.ops import SHAPE_ONLY
from tfqc.ir.program import STEP, Program, Role
from tfqc.ir.rows import BINDING_TIMES, BindingTime, RowSource
from tfqc.ir.types import symbols_of

Roles = frozenset[Role]


def data_flow(graph: fx.Graph) -> nx.DiGraph:
    """Value dependencies of a function, as a graph over node names. Reading a shape is not reading a value."""
    flow: nx.DiGraph = nx.DiGraph()
    for node in graph.nodes:
        flow.add_node(node.name)
        if node.op == "call_function" and node.target in SHAPE_ONLY:
            continue
        flow.add_edges_from((operand.name, node.name) for operand in node.all_input_nodes)
    return flow


def binding_times(program: Program, function: str = STEP) -> dict[str, Roles]:
    """Roles that each node of a function depends on, directly or through others.

    A value whose shape needs a symbol that only the sample has (its height, say) counts as dependent on the sample:
    without one it cannot be made. Parameters that a pass added depend on what their rows depend on.
    """
    sources, available = _sources(program), symbols_without_sample(program)
    roles: dict[str, Roles] = {}
    for node in program.functions[function].nodes:  # topological, so one sweep carries everything on
        own = sources.get(node.name)
        found: set[Role] = set() if own is None else {own}
        if node.target not in SHAPE_ONLY:
            read = node.all_input_nodes
            found.update(*(roles[n.name] for n in read))
            needed = {s for n in read if _is_size(n) for s in symbols_of(program.types[n.name])} - available
            if needed and is_call(node):
                found.add(Role.SAMPLE)
        roles[node.name] = frozenset(found)
    return roles


def binding_table(program: Program) -> dict[str, BindingTime]:
    """Rows of the table `binding` for all functions; dynamic values have none."""
    found: dict[str, BindingTime] = {}
    for function, graph in program.functions.items():
        roles = binding_times(program, function)
        named = {
            n.name: BINDING_TIMES.get(roles[n.name]) for n in graph.nodes if n.op in ("call_function", "placeholder")
        }
        found |= {name: BindingTime(time) for name, time in named.items() if time is not None}
    return found


def edge_nodes(program: Program) -> list[fx.Node]:
    """The model's first and last layer: of the weighted nodes that depend on the sample."""
    roles = binding_times(program)
    dynamic = [n for n in weighted_nodes(program) if Role.SAMPLE in roles[n.name]]
    return dynamic[:1] + dynamic[1:][-1:]


def symbols_without_sample(program: Program) -> set[str]:
    """Symbolic dimensions that the time and request inputs know."""
    return symbols_known(program, Role.TIME, Role.REQUEST)


def symbols_known(program: Program, *roles: Role) -> set[str]:
    """Symbolic dimensions of the inputs that have one of the roles."""
    return {s for i in program.inputs if i.role in roles for s in symbols_of(i.type)}


def needing_other_sizes(program: Program, known: set[str], function: str = STEP) -> set[str]:
    """Nodes that cannot be made by who knows only the symbols `known`: they, or what they read, take other sizes."""
    found: set[str] = set()
    for node in program.functions[function].nodes:
        sizes = (n for n in (node, *node.all_input_nodes) if _is_size(n))
        unknown = any(symbols_of(program.types[n.name]) - known for n in sizes)
        if unknown or any(n.name in found for n in node.all_input_nodes):
            found.add(node.name)
    return found


def _is_size(node: fx.Node) -> bool:
    return is_call(node, torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def _sources(program: Program) -> dict[str, Role]:
    sources = {i.name: i.role for i in program.inputs}
    kinds = {"row": Role.TIME, "time": Role.TIME, "begin": Role.REQUEST}
    for name, row in program.table(RowSource).items():
        if row.kind in kinds:
            sources[name] = kinds[row.kind]
    return sources
