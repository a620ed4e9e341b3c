"""hoist-request: what depends on the request alone (text keys and values) is computed once per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.binding import binding_times, needing_other_sizes, symbols_known
from tfqc.analysis.outline import add_outlined
from tfqc.ir.program import BEGIN, STEP, Program, Role, Stage, copy_node
from tfqc.ir.rows import RowSource
from tfqc.ir.tables import Fact
from tfqc.passing import EXACT, Context, Numerics, Pass


@dataclass(frozen=True)
class HoistRequest(Pass):
    """Move request-static values out of @step into @begin, whose results are kept while the request tensors stay.

    The run time recognises a request by the identity and the version of its tensors, so a prompt that is changed in
    place is computed anew.
    """

    name: ClassVar[str] = "hoist-request"
    needs: ClassVar[Stage] = Stage.FOLDED
    below: ClassVar[Stage | None] = Stage.LOWERED
    provides: ClassVar[frozenset[Fact]] = frozenset({RowSource})
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Outline @begin; its outputs become parameters of @step under their own names."""
        sources = program.tables.setdefault(RowSource.table, {})
        roles = binding_times(program)
        late = needing_other_sizes(program, symbols_known(program, Role.REQUEST))
        waiting = {
            n
            for n in program.step.nodes
            if n.op == "call_function" and roles[n.name] == frozenset({Role.REQUEST}) and n.name not in late
        }
        values = [n for n in waiting if program.tensor_type(n) and any(u not in waiting for u in n.users)]
        values = [n for n in program.step.nodes if n in values]
        if not values or BEGIN in program.functions:
            return
        add_outlined(program, BEGIN, values, {Role.REQUEST})
        program.functions[STEP] = _with_parameters(program.step, values)
        for output, node in enumerate(values):
            sources[node.name] = RowSource("begin", output)
        program.drop_unread_parameters()
        moved = sum(n.op == "call_function" for n in program.functions[BEGIN].nodes)
        ctx.remark("hoisted", operations=moved, values=len(values))


def _with_parameters(graph: fx.Graph, values: list[fx.Node]) -> fx.Graph:
    """A copy of a graph in which `values` are parameters of the same names."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.nodes if n.op == "placeholder"] + values:
        mapping[node] = new.create_node("placeholder", node.name, name=node.name)
    for node in graph.nodes:
        if node not in mapping:
            mapping[node] = copy_node(new, node, mapping)
    return new
