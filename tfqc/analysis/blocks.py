"""Blocks of a network: runs of operations that are reconstructed together (BRECQ, arXiv 2102.05426)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from tfqc.analysis.weighted import weighted_nodes
from tfqc.ir.match import is_call
from tfqc.ir.program import Program, copy_node
from tfqc.ir.rows import Tib

MOST = 16  # layers of a block: joint attention of two streams with both feed-forward networks has as many


@dataclass(frozen=True)
class Block:
    """Operations of @step in order, as a function of its own.

    module: path of the part of the model that it is. graph: takes `reads`, returns the tuple `gives`; nodes have the
    names that they have in the program.
    """

    module: str
    graph: fx.Graph
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    layers: tuple[str, ...]


def given_of(program: Program) -> Block:
    """What the blocks are given: the temporal features, and all that these are computed from."""
    tib = program.table(Tib)
    found = {node for node in program.step.nodes if node.name in tib and is_call(node)}
    for node in reversed(program.step.nodes):
        if node in found:
            found |= {n for n in node.all_input_nodes if is_call(n)}
    return _block(program, "", [n for n in program.step.nodes if n in found])


def blocks_of(program: Program) -> list[Block]:
    """All of @step but what `given_of` computes, in blocks.

    A block is the largest part of the model, by the modules that operations come from, with at most `MOST` layers;
    operations between two parts go to the one before them.
    """
    given = {node.name for node in given_of(program).graph.nodes}
    nodes = [n for n in program.step.nodes if is_call(n) and n.name not in given]
    layers = {n.name for n in weighted_nodes(program)} - given
    module = {n.name: program.origins[n.name].module if n.name in program.origins else "" for n in nodes}
    held: dict[str, int] = {}
    for name in layers:
        for part in _parts(module[name]):
            held[part] = held.get(part, 0) + 1
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in nodes:
        of = next((p for p in _parts(module[node.name]) if 0 < held.get(p, 0) <= MOST), "")
        if not runs or (of and of != runs[-1][0] and any(n.name in layers for n in runs[-1][1])):
            runs.append((of, []))
        elif of and not any(n.name in layers for n in runs[-1][1]):
            runs[-1] = (of, runs[-1][1])
        runs[-1][1].append(node)
    return [_block(program, of, run) for of, run in runs]


def _parts(module: str) -> list[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`."""
    names = module.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names))]


def _block(program: Program, module: str, nodes: Sequence[fx.Node]) -> Block:
    own = set(nodes)
    read = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in own))
    gives = [n for n in nodes if any(user not in own for user in n.users)]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in read:
        made = graph.placeholder(node.name) if node.op != "get_attr" else None
        mapping[node] = made or graph.create_node("get_attr", node.target, name=node.name)
    for node in nodes:
        mapping[node] = copy_node(graph, node, mapping)
    graph.output(tuple(mapping[n] for n in gives))
    layers = {n.name for n in weighted_nodes(program)}
    return Block(
        module,
        graph,
        tuple(n.name for n in read if n.op != "get_attr"),
        tuple(n.name for n in gives),
        tuple(n.name for n in nodes if n.name in layers),
    )
