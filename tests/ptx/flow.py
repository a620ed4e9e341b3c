"""Control flow: the order in which blocks must run so that diverged threads meet again as early as they can.

Threads of a warp that have diverged run lowest position first. In the order of the text that may run what follows a
loop or a branch before the rest of it, if the compiler has moved that to the end. Here blocks stand in a weak
topological order (Bourdoncle 1993): everything behind what leads to it, and a loop whole before what follows it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import networkx as nx

from tests.ptx.errors import PtxError
from tests.ptx.parse import parse
from tests.ptx.syntax import Instruction, Kernel, Label

ENDS = ("ret", "exit")


@dataclass(frozen=True)
class Step:
    """An instruction, or none for a jump that the order of blocks needs; `target` is where a jump goes."""

    instruction: Instruction | None
    target: int = -1


@dataclass(frozen=True)
class _Blocks:
    """Basic blocks by the index of their first instruction."""

    ends: dict[int, int]
    graph: nx.DiGraph
    order: list[int]
    loops: list[set[int]]  # an inner loop stands behind the loop around it


def _target(kernel: Kernel, instruction: Instruction) -> int:
    (label,) = instruction.operands
    if not isinstance(label, Label) or label.name not in kernel.labels:
        raise PtxError("a jump to nowhere", kernel.name, instruction.line, instruction.text)
    return kernel.labels[label.name]


def _blocks(kernel: Kernel) -> _Blocks:
    body = kernel.body
    leaders = {0, *kernel.labels.values()}
    leaders |= {i + 1 for i, each in enumerate(body) if each.name == "bra" or each.name in ENDS}
    starts = sorted(i for i in leaders if i < len(body))
    ends = dict(zip(starts, [*starts[1:], len(body)], strict=True))
    graph = nx.DiGraph()
    for start, end in ends.items():
        graph.add_node(start)
        last = body[end - 1]
        if last.name == "bra":
            graph.add_edge(start, _target(kernel, last))
        if end < len(body) and (last.guard or last.name not in ("bra", *ENDS)):
            graph.add_edge(start, end)
    graph = graph.subgraph(nx.descendants(graph, 0) | {0})
    loops: list[set[int]] = []
    order = _ordered(graph, {0}, loops)
    return _Blocks(ends, graph, order, loops)


def _ordered(graph: nx.DiGraph, entries: set[int], loops: list[set[int]]) -> list[int]:
    order: list[int] = []
    parts = nx.condensation(graph)
    for part in nx.lexicographical_topological_sort(parts, key=lambda p: min(parts.nodes[p]["members"])):
        members: set[int] = parts.nodes[part]["members"]
        inside = graph.subgraph(members)
        if len(members) == 1 and not inside.edges:
            order += members
            continue
        loops.append(members)
        entered = {b for b in members if b in entries or any(a not in members for a in graph.predecessors(b))}
        head = min(entered)
        rest = graph.subgraph(members - {head})
        order += [head, *_ordered(rest, {b for b in rest if graph.has_edge(head, b)}, loops)]
    return order


def arrange(kernel: Kernel) -> list[Step]:
    """The instructions that can be reached, block by block in that order."""
    if not kernel.body:
        raise PtxError("the kernel is empty", kernel.name)
    blocks = _blocks(kernel)
    places: dict[int, int] = {}
    parts: list[list[tuple[Instruction | None, int]]] = []
    at = 0
    for position, start in enumerate(blocks.order):
        places[start] = at
        end = blocks.ends[start]
        part = [(each, _target(kernel, each) if each.name == "bra" else -1) for each in kernel.body[start:end]]
        following = blocks.order[position + 1] if position + 1 < len(blocks.order) else -1
        if blocks.graph.has_edge(start, end) and following != end:
            part.append((None, end))
        last = kernel.body[end - 1]
        if end == len(kernel.body) and (last.guard or last.name not in ("bra", *ENDS)):
            raise PtxError("runs beyond the end of the kernel", kernel.name, last.line, last.text)
        parts.append(part)
        at += len(part)
    return [Step(each, places.get(target, -1)) for part in parts for each, target in part]


@functools.lru_cache(maxsize=16)
def main_loop(ptx: str, kernel: str) -> frozenset[int]:
    """The lines of the PTX text in the loop with most mma instructions, of nested ones the innermost."""
    its = parse(ptx).kernels[kernel]
    blocks = _blocks(its)

    def lines(loop: set[int]) -> list[Instruction]:
        return [each for start in loop for each in its.body[start : blocks.ends[start]]]

    def weight(loop: set[int]) -> tuple[int, int]:
        return sum(each.name == "mma" for each in lines(loop)), -len(lines(loop))

    if not blocks.loops:
        raise PtxError("has no loop", kernel)
    return frozenset(each.line for each in lines(max(blocks.loops, key=weight)))
