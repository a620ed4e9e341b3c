"""Taking a part of @step out into a function of its own: partial evaluation by binding time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.ir.calls import canonical
from tfqc.ir.ops import SHAPE_ONLY
from tfqc.ir.program import Program, Role
from tfqc.ir.types import ScalarType, Type


def outline(program: Program, outputs: Iterable[fx.Node], roles: set[Role]) -> fx.Graph:
    """A new function that computes `outputs` (nodes of one function) from the inputs that have `roles`.

    The program is not changed. Nodes keep their names. All inputs of the roles are parameters, read or not. Sizes that
    were read off the sample are read off an input of the new function that has the same symbol. Returns a tuple of the
    outputs.

    Raises:
        PassError: an output depends on an input of another role.
    """
    return _Outline(program, roles).graph_of(list(outputs))


def add_outlined(program: Program, function: str, outputs: Iterable[fx.Node], roles: set[Role]) -> None:
    """Make what `outline` gives a function of the program.

    Raises:
        PassError: an output depends on an input of another role.
    """
    made = _Outline(program, roles)
    program.functions[function] = made.graph_of(list(outputs))
    program.types.update(made.types)


class _Outline:
    def __init__(self, program: Program, roles: set[Role]) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.inputs = [i for i in program.inputs if i.role in roles]
        # Sizes are read off the timesteps, if they are there: the other inputs need not be, where their values are not.
        self.inputs.sort(key=lambda i: i.role is not Role.TIME)
        self.given = {i.name: self.graph.placeholder(i.name) for i in program.inputs if i.role in roles}
        self.types: dict[str, Type] = {i.name: i.type for i in self.inputs}  # of what is new in the program
        self.sizes: dict[str, fx.Node] = {}

    def graph_of(self, wanted: list[fx.Node]) -> fx.Graph:
        needed = self._needed(wanted)
        mapping: dict[fx.Node, fx.Node] = {}
        ordered = [n for n in wanted[0].graph.nodes if n in needed] if wanted else []
        for node in [n for n in ordered if n.op == "get_attr"]:
            mapping[node] = self.graph.create_node("get_attr", node.target, name=node.name)
        for node in ordered:
            if node.op == "placeholder":
                if node.name not in self.given:
                    raise PassError(
                        f"{self._reader(node, needed)} reads %{node.name}, which is not there at that time."
                    )
                mapping[node] = self.given[node.name]
            elif node.op == "call_function":
                if (symbol := self._symbol(node)) in self._known():
                    mapping[node] = self._size(symbol)
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: mapping[n])
                mapping[node] = self.graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        self.graph.output(tuple(mapping[n] for n in wanted))
        return self.graph

    def _needed(self, wanted: list[fx.Node]) -> set[fx.Node]:
        """The outputs and all that they are computed from; what only tells a known size is not computed."""
        needed: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                if self._symbol(node) not in self._known():
                    stack.extend(node.all_input_nodes)
        return needed

    def _symbol(self, node: fx.Node) -> str:
        """The symbol that a node reads off a shape; empty for any other node."""
        type_ = self.program.types.get(node.name)
        reads = node.op == "call_function" and node.target in SHAPE_ONLY
        return type_.value or "" if reads and isinstance(type_, ScalarType) else ""

    def _known(self) -> set[str]:
        return {dim for i in self.inputs for dim in i.type.shape if isinstance(dim, str)}

    def _size(self, symbol: str) -> fx.Node:
        if symbol not in self.sizes:
            item = next(i for i in self.inputs if symbol in i.type.shape)
            at = item.type.shape.index(symbol)
            target = torch.ops.aten.sym_size.int
            operands = canonical(target, (self.given[item.name], at), {})
            made = self.graph.create_node("call_function", target, *operands)
            made.name = self.graph._graph_namespace.create_name(f"size_{item.name}_{at}", made)
            self.types[made.name] = ScalarType("int", symbol)
            self.sizes[symbol] = made
        return self.sizes[symbol]

    def _reader(self, node: fx.Node, needed: set[fx.Node]) -> str:
        return self.program.at(next((u for u in node.users if u in needed), node))
