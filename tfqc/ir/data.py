"""The Program: up to three functions over one store of tensors, with input roles, a stage and typed side tables.

`step` is what runs at every timestep. `time` computes temporal features (and anything else that waits for the
timestep but not for the sample); `begin` computes what is constant over one image. A function is a plain `fx.Graph`
of ATen and tfqc operations; a name denotes the same value in every function in which it occurs.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, fx

from tfqc.errors import TfqcError
from tfqc.ir.tables import OpaqueRow, Row, SideTable, understood
from tfqc.ir.types import Dim, TensorType, Type
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
class ProgramData:
    """A captured model on its way to an artifact: what it holds, and reading it.

    `tensors` holds every parameter, buffer and table by dotted name; `get_attr` nodes refer to it. `symbols` gives a
    small example value for each symbolic dimension.

    How it is called: `arguments` are the names of the model's arguments in order, `constants` what was captured of
    those that are no tensors (path in the call -> None, bool, int, float or str), `guards` comparisons over the
    symbols that calls have to fulfil, such as `H % 2 == 0`. What it returns: `outputs` is the structure around the
    tensors that @step returns (`tfqc.runtime.outputs`), None where it is a tensor or a tuple of them.
    """

    functions: dict[str, fx.Graph]
    tensors: dict[str, Tensor]
    inputs: tuple[Input, ...]
    types: dict[str, Type] = field(default_factory=dict[str, Type])
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])
    symbols: dict[str, int] = field(default_factory=dict[str, int])
    stage: Stage = Stage.CAPTURED
    tables: dict[str, SideTable] = field(default_factory=dict[str, SideTable])
    model: str = "model"
    arguments: tuple[str, ...] = ()
    constants: dict[tuple[str, ...], Constant] = field(default_factory=dict[tuple[str, ...], Constant])
    guards: tuple[str, ...] = ()
    outputs: Any = None
    _numbers: dict[str, int] = field(default_factory=dict[str, int], init=False, repr=False, compare=False)
    _nodes: dict[fx.Graph, dict[str, fx.Node]] = field(
        default_factory=dict[fx.Graph, dict[str, fx.Node]], init=False, repr=False, compare=False
    )

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def step(self) -> fx.Graph:
        """The function of every timestep."""
        return self.functions[STEP]

    def nodes(self, function: str = STEP) -> Iterator[fx.Node]:
        """Nodes of a function in order, safe against edits on the way.

        Raises:
            TfqcError: there is no function of that name.
        """
        if function not in self.functions:
            asked = "A graph" if isinstance(function, fx.Graph) else f"@{function}"
            known = ", ".join(map(repr, self.functions))
            raise TfqcError(f"{asked} is no function of the program, which are given by name: {known}.")
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

    @property
    def batch(self) -> Dim:
        """How many images a call has: a symbol, or the number that the model's code fixes."""
        samples = self.input(Role.SAMPLE)
        return samples[0].type.shape[0] if samples and samples[0].type.shape else "B"

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
        if isinstance(next(iter(rows.values()), None), OpaqueRow):  # all of a table are read alike
            rows = self.tables[row.table] = understood(row, rows)  # type: ignore[assignment]
        return rows  # type: ignore[return-value]

    @property
    def has_weights(self) -> bool:
        """False for a program captured without weights (on the meta device)."""
        return not any(t.is_meta for t in self.tensors.values())

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

    def __repr__(self) -> str:
        operations = sum(n.op == "call_function" for n in self.step.nodes)
        return f"<program of {self.model}, {self.stage}: {operations} operations a step>"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that keeps the names of its nodes."""
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy_node(new, node, mapping)
    return new


def copy_node(graph: fx.Graph, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """A copy of a node of another graph, under its name; `mapping` gives what stands here for what it reads."""
    return graph.create_node(
        node.op,
        node.target,
        fx.map_arg(node.args, lambda n: mapping[n]),
        fx.map_arg(node.kwargs, lambda n: mapping[n]),
        name=node.name,
    )
