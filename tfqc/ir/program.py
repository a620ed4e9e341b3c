"""The Program: what passes edit, print and run."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, fx

from tfqc.files.spill import spilled
from tfqc.ir.calls import canonical
from tfqc.ir.data import (
    BEGIN,
    ROWS,
    STEP,
    TIME,
    Constant,
    Input,
    Origin,
    ProgramData,
    Role,
    Stage,
    copy_graph,
    copy_node,
)
from tfqc.ir.infer import infer_type
from tfqc.ir.interpret import interpreter
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.pt2 import save_pt2
from tfqc.ir.render import render
from tfqc.ir.rows import RowSource
from tfqc.ir.schema import check_call
from tfqc.ir.tables import Row
from tfqc.ir.types import TensorType, Type

__all__ = [
    "BEGIN", "ROWS", "STEP", "TIME", "Constant", "Input", "Origin", "Program", "Role", "Stage", "copy_graph",
    "copy_node", "tensor_node_name",
]  # fmt: skip

R = TypeVar("R", bound=Row)


class Program(ProgramData):
    """A captured model on its way to an artifact. Call it with the model's own inputs at any stage."""

    def set_table(self, row: type[R], rows: dict[str, R]) -> None:
        """Replace a side table."""
        self.tables[row.table] = dict(rows)

    def add_tensor(self, name: str, value: Tensor) -> str:
        """Keep a new tensor as `name`, or as `name.1`, `name.2` ... where another has that name. Returns the name."""
        return self.add_tensors(name, {"": value})[0]

    def add_tensors(self, stem: str, values: Mapping[str, Tensor]) -> list[str]:
        """Keep new tensors as `stem.codes`, `stem.scale` and so on, by the keys of `values`; "" is the stem itself.

        Where a tensor has one of these names, the stem becomes `stem.1`, `stem.2` ...: nothing is ever replaced, be it
        the model's own or what was made of another reader of the same weight. Returns the names. Tensors lie in files
        where there is no room for them (`tfqc.files.spill`).
        """
        for number in itertools.count():
            base = f"{stem}.{number}" if number else stem
            names = [f"{base}.{part}" if part else base for part in values]
            if not any(name in self.tensors for name in names):
                for name, value in zip(names, values.values(), strict=True):
                    self.tensors[name] = spilled(value, self.tensors.values())
                return names
        raise AssertionError

    def tensor_node(self, name: str, function: str = STEP) -> fx.Node:
        """The one node of `function` that reads tensor `name`; made if there is none."""
        graph = self.functions[function]
        usual = tensor_node_name(name)
        if (found := self.find(usual, graph)) is not None and found.op == "get_attr" and found.target == name:
            return found
        if usual in graph._graph_namespace._used_names:  # another node's name: this tensor's node has a longer one
            for node in graph.find_nodes(op="get_attr", sort=False):
                if node.target == name:
                    return node
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            node = graph.create_node("get_attr", name, name=usual)
        self._nodes.setdefault(graph, {})[node.name] = node
        tensor = self.tensors[name]
        self.types[node.name] = TensorType(tensor.dtype, tuple(tensor.shape))
        return node

    def insert(
        self,
        before: fx.Node,
        target: Any,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        name: str | None = None,
        function: str = STEP,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Insert `target(*args, **kwargs)` before a node, typed by running it on the meta device.

        `like` gives the new node its origin (default: `before`'s).

        Raises:
            IRError: the operation takes no such operands.
        """
        graph = self.functions[function]
        with graph.inserting_before(before):
            operands = _checked(self, target, tuple(args), kwargs or {})
            node = graph.create_node("call_function", target, *operands, name=self._fresh(name, target))
        self._nodes.setdefault(graph, {})[node.name] = node
        self.types[node.name] = infer_type(self, node)
        if origin := self.origins.get((like or before).name):
            self.origins[node.name] = origin
        return node

    def _fresh(self, name: str | None, target: Any) -> str:
        """A name that no function uses: a name denotes one value in the whole program."""
        base = name or op_name(target).split(".")[1]
        used = [g._graph_namespace._used_names for g in self.functions.values()]
        for number in itertools.count(self._numbers.get(base, 0)):  # names that were given stay given
            candidate = f"{base}_{number}" if number else base
            if not any(candidate in names for names in used):
                self._numbers[base] = number
                return candidate
        raise AssertionError

    def add_input(self, name: str, type_: Type, function: str = STEP) -> fx.Node:
        """Append a placeholder to a function."""
        graph = self.functions[function]
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            node = graph.placeholder(name)
        self.types[node.name] = type_
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old` read `new`, erase `old`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        old.graph.erase_node(old)

    def prune(self) -> None:
        """Drop what nothing reads: dead nodes, tensors, types, origins and side-table rows."""
        for graph in self.functions.values():
            for node in reversed(list(graph.nodes)):
                if not node.users and node.op in ("call_function", "get_attr") and not works_in_place(node.target):
                    graph.erase_node(node)
        names = {n.name for g in self.functions.values() for n in g.nodes}
        self.types = {k: v for k, v in self.types.items() if k in names}
        self.origins = {k: v for k, v in self.origins.items() if k in names}
        for table in self.tables.values():
            for name in [n for n, row in table.items() if row.of_node and n not in names]:
                del table[name]
        kept = {str(n.target) for g in self.functions.values() for n in g.nodes if n.op == "get_attr"}
        kept |= {tensor for table in self.tables.values() for row in table.values() for tensor in row.tensors()}
        self.tensors = {k: v for k, v in self.tensors.items() if k in kept}
        sources = self.table(RowSource)
        for name in [n for n in sources if n not in kept and n not in names]:
            del sources[name]

    def drop_unread_parameters(self) -> None:
        """Take parameters that nothing reads off @step. The row index stays while quantizers wait to read it."""
        self.prune()
        sources = self.table(RowSource)
        read = {str(n.target) for n in self.step.nodes if n.op == "get_attr"}
        waiting = any(s.kind in ("activation", "table") and name not in read for name, s in sources.items())
        awaited = {"row"} if waiting else set[str]()
        for node in self.nodes():
            kind = sources[node.name].kind if node.name in sources else ""
            if node.op == "placeholder" and not node.users and kind not in awaited:
                self.step.erase_node(node)
        self.prune()

    def clone(self) -> Program:
        """A copy whose graphs and tables can be edited apart; tensors are shared (passes replace, never mutate)."""
        functions: dict[str, fx.Graph] = {}
        for name, graph in self.functions.items():
            functions[name] = copy_graph(graph)
        return Program(
            functions,
            dict(self.tensors),
            self.inputs,
            dict(self.types),
            dict(self.origins),
            dict(self.symbols),
            self.stage,
            {name: dict(rows) for name, rows in self.tables.items()},
            self.model,
            self.arguments,
            dict(self.constants),
            self.guards,
            self.outputs,
        )

    def save_pt2(self, path: str | Path) -> None:
        """Write a `.pt2` file, which torch.export.load reads without tfqc: see `tfqc.ir.pt2.save_pt2`."""
        save_pt2(self, Path(path))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The reference interpretation: the captured model's inputs in, its outputs out, at every stage."""
        return interpreter(self)(*args, **kwargs)

    def __repr__(self) -> str:
        operations = sum(n.op == "call_function" for n in self.step.nodes)
        return f"<program of {self.model}, {self.stage}: {operations} operations a step>"

    def __str__(self) -> str:
        return render(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self.clone()


def _checked(program: Program, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    check_call(target, args, kwargs, program.types)
    return canonical(target, args, kwargs)


def tensor_node_name(tensor: str) -> str:
    """Name of the node that reads a tensor: a valid identifier, distinct for distinct dotted names."""
    return "w_" + tensor.replace("_", "__").replace(".", "_")
