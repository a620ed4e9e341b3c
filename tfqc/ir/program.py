"""The Program: up to three functions over one store of tensors, with input roles, a stage and typed side tables.

`step` is what runs at every timestep. `time` computes temporal features (and anything else that waits for the
timestep but not for the sample); `begin` computes what is constant over one image. A function is a plain `fx.Graph`
of ATen and tfqc operations; a name denotes the same value in every function in which it occurs.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx

from tfqc.errors import TfqcError
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.rows import RowSource
from tfqc.ir.tables import OpaqueRow, Row, Table, understood
from tfqc.ir.types import TensorType, Type
from tfqc.runtime import buffer_name

R = TypeVar("R", bound=Row)
STEP, TIME, BEGIN = "step", "time", "begin"
ROWS = "R"  # the symbol of the row index: one row for the whole batch, or one for each of its entries
Constant = bool | int | float | str | None


class Stage(enum.IntEnum):
    """How far a program has come; each stage has invariants of its own (`tfqc.ir.verify`)."""

    CAPTURED = 0
    NORMALIZED = 1
    ANALYZED = 2
    CALIBRATED = 3
    FOLDED = 4
    LOWERED = 5

    def __str__(self) -> str:
        return self.name.lower()


class Role(enum.StrEnum):
    """What changes an input: every step (`sample`, `time`) or every image (`request`)."""

    SAMPLE = "sample"
    TIME = "time"
    REQUEST = "request"


@dataclass(frozen=True)
class Input:
    """One tensor input of the captured model.

    `path` says where it stands in a call: `("added_cond_kwargs", "time_ids")`. `domain` is the number of values
    that a request input of class labels may take, when that was declared.
    """

    name: str
    role: Role
    path: tuple[str, ...]
    type: TensorType
    domain: int | None = None


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: the module's path in the model, and `file:line` of the Python that computed it."""

    module: str = ""
    source: str = ""


@dataclass
class Program:
    """A captured model on its way to an artifact. Call it with the model's own inputs at any stage.

    `tensors` holds every parameter, buffer and table by dotted name; `get_attr` nodes refer to it. `symbols` gives a
    small example value for each symbolic dimension. `outputs` in a graph keep the model's own structure.

    How it is called: `arguments` are the names of the model's arguments in order, `constants` what was captured of
    those that are no tensors (path in the call -> None, bool, int, float or str), `guards` comparisons over the
    symbols that calls have to fulfil, such as `H % 2 == 0`.
    """

    functions: dict[str, fx.Graph]
    tensors: dict[str, Tensor]
    inputs: tuple[Input, ...]
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    symbols: dict[str, int] = field(default_factory=dict[str, int])
    stage: Stage = Stage.CAPTURED
    tables: dict[str, Table] = field(default_factory=dict[str, Table])
    model: str = "model"
    arguments: tuple[str, ...] = ()
    constants: dict[tuple[str, ...], Constant] = field(default_factory=dict[tuple[str, ...], Constant])
    guards: tuple[str, ...] = ()
    _nodes: dict[fx.Graph, dict[str, fx.Node]] = field(
        default_factory=dict[fx.Graph, dict[str, fx.Node]], init=False, repr=False, compare=False
    )

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> fx.Graph:
        """The function of every timestep."""
        return self.functions[STEP]

    def nodes(self, function: str = STEP) -> Iterator[fx.Node]:
        """Nodes of a function in order, safe against edits on the way."""
        return iter(list(self.functions[function].nodes))

    def node(self, name: str, function: str = STEP) -> fx.Node:
        """The node called `name`.

        Raises:
            TfqcError: there is none.
        """
        if (node := self.find(name, self.functions[function])) is None:
            raise TfqcError(f"There is no %{name} in @{function}.")
        return node

    def input(self, role: Role) -> list[Input]:
        """Inputs with a role, in order."""
        return [i for i in self.inputs if i.role is role]

    def type(self, node: fx.Node) -> Type:
        """The type of a node's value."""
        return self.types[node.name]

    def tensor_type(self, node: fx.Node) -> TensorType | None:
        """The type of a node's value if that is one tensor."""
        type_ = self.types.get(node.name)
        return type_ if isinstance(type_, TensorType) else None

    def at(self, node: fx.Node) -> str:
        """`%name (module path, file:line)`: how messages name a node."""
        origin = self.origins.get(node.name, Origin())
        where = ", ".join(part for part in (origin.module, origin.source) if part)
        return f"%{node.name} ({where})" if where else f"%{node.name}"

    def table(self, row: type[R]) -> dict[str, R]:
        """Rows of one kind by node name; empty when no pass has provided them."""
        rows = self.tables.get(row.table, {})
        if any(isinstance(r, OpaqueRow) for r in rows.values()):
            rows = self.tables[row.table] = understood(row, rows)  # type: ignore[assignment]
        return rows  # type: ignore[return-value]

    @property
    def has_weights(self) -> bool:
        """False for a program captured without weights (on the meta device)."""
        return not any(t.is_meta for t in self.tensors.values())

    # -- editing ---------------------------------------------------------------------------------------------------

    def set_table(self, row: type[R], rows: dict[str, R]) -> None:
        """Replace a side table."""
        self.tables[row.table] = dict(rows)

    def add_tensor(self, name: str, value: Tensor) -> str:
        """Keep a new tensor as `name`, or as `name.1`, `name.2` ... where another has that name. Returns the name."""
        return self.add_tensors(name, {"": value})[0]

    def add_tensors(self, stem: str, values: Mapping[str, Tensor]) -> list[str]:
        """Keep new tensors as `stem.codes`, `stem.scale` and so on, by the keys of `values`; "" is the stem itself.

        Where a tensor has one of these names, the stem becomes `stem.1`, `stem.2` ...: nothing is ever replaced, be it
        the model's own or what was made of another reader of the same weight. Returns the names.
        """
        for number in itertools.count():
            base = f"{stem}.{number}" if number else stem
            names = [f"{base}.{part}" if part else base for part in values]
            if not any(name in self.tensors for name in names):
                self.tensors.update(zip(names, values.values(), strict=True))
                return names
        raise AssertionError

    def tensor_node(self, name: str, function: str = STEP) -> fx.Node:
        """The one node of `function` that reads tensor `name`; made if there is none."""
        graph = self.functions[function]
        usual = self.find(tensor_node_name(name), graph)
        for node in (usual, *graph.find_nodes(op="get_attr", sort=False)):
            if node is not None and node.op == "get_attr" and node.target == name:
                return node
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            node = graph.create_node("get_attr", name, name=tensor_node_name(name))
        tensor = self.tensors[name]
        self.types[node.name] = TensorType(tensor.dtype, tuple(tensor.shape))
        return node

    def insert(
        self,
        before: fx.Node,
        target: Any,
        args: Iterable[Any],
        *,
        name: str | None = None,
        function: str = STEP,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Insert `target(*args)` before a node, typed by running it on the meta device.

        `like` gives the new node its origin (default: `before`'s).
        """
        from tfqc.ir.infer import infer_type

        graph = self.functions[function]
        with graph.inserting_before(before):
            node = graph.create_node("call_function", target, tuple(args), {}, name=self._fresh(name, target))
        self.types[node.name] = infer_type(self, node)
        if origin := self.origins.get((like or before).name):
            self.origins[node.name] = origin
        return node

    def _fresh(self, name: str | None, target: Any) -> str:
        """A name that no function uses: a name denotes one value in the whole program."""
        base = name or op_name(target).split(".")[1]
        candidates = (base if i == 0 else f"{base}_{i}" for i in itertools.count())
        return next(c for c in candidates if not any(self.find(c, g) for g in self.functions.values()))

    def find(self, name: str, graph: fx.Graph) -> fx.Node | None:
        """The node of a name, looked up in an index that is made anew whenever it turns out to be stale.

        Graphs are edited by anybody, so what is found is checked; and a name that a graph has never given to a node
        (it remembers all) is not looked for.
        """
        if name not in graph._graph_namespace._used_names:
            return None
        index = self._nodes.setdefault(graph, {})
        node = index.get(name)
        if node is None or node.name != name or node._erased:
            index.clear()
            index.update((n.name, n) for n in graph.nodes)
            node = index.get(name)
        return node

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
        awaited = {"row"} if any(s.kind == "activation" for s in sources.values()) else set[str]()
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
        )

    # -- running ---------------------------------------------------------------------------------------------------

    def module(self, function: str = STEP) -> fx.GraphModule:
        """One function as an executable module that shares the program's tensors, as buffers of flat names."""
        graph = copy_graph(self.functions[function])
        read: dict[str, Tensor] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                name = str(node.target)
                node.target = buffer_name(name)
                read[node.target] = self.tensors[name]
        return fx.GraphModule(read, graph, class_name=function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The reference interpretation: the captured model's inputs in, its outputs out, at every stage."""
        from tfqc.interpret import interpreter

        return interpreter(self)(*args, **kwargs)

    def __repr__(self) -> str:
        operations = sum(n.op == "call_function" for n in self.step.nodes)
        return f"<program of {self.model}, {self.stage}: {operations} operations a step>"

    def __str__(self) -> str:
        from tfqc.ir.render import render

        return render(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return self.clone()


def tensor_node_name(tensor: str) -> str:
    """Name of the node that reads a tensor: a valid identifier, distinct for distinct dotted names."""
    return "w_" + tensor.replace("_", "__").replace(".", "_")


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that keeps the names of its nodes."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = new.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, lambda n: mapping[n]),
            fx.map_arg(node.kwargs, lambda n: mapping[n]),
            name=node.name,
        )
        mapping[node] = copied
    return new
