"""The reference interpretation of a Program, at every stage: its functions run as fx graph modules."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import TfqcError
from tfqc.ir.data import BEGIN, STEP, TIME, ProgramData, Role
from tfqc.ir.match import is_call
from tfqc.ir.rows import RowSource, Schedule
from tfqc.runtime import Input, Plan, Stepper, Table, buffer_name


def plan_of(program: ProgramData) -> Plan:
    """How a call of the program becomes calls of its functions, as its side tables say."""
    sources = program.table(RowSource)
    schedule = program.table(Schedule).get("schedule")
    by_kind = {kind: {k: r for k, r in sources.items() if r.kind == kind} for kind in
               ("row", "begin", "time", "table", "activation")}  # fmt: skip
    domain = {i.name: i.domain or 1 for i in program.inputs}
    return Plan(
        inputs=tuple(Input(i.name, str(i.role), i.path, i.type.dtype, i.type.shape) for i in program.inputs),
        arguments=program.arguments or tuple(dict.fromkeys(i.path[0] for i in program.inputs)),
        constants=tuple(sorted(program.constants.items())),
        guards=program.guards,
        timesteps=schedule.timesteps if schedule else (),
        policy=schedule.policy if schedule else "recompute",
        row=next((name for name, row in by_kind["row"].items() if not row.label), ""),
        label_rows={k: (r.label, domain[r.label]) for k, r in sorted(by_kind["row"].items()) if r.label},
        per_image=tuple(i.name for i in program.input(Role.REQUEST) if i.type.shape[:1] == ("B",)),
        tables=tuple(
            Table(name, row.output, row.encoding, row.scale, row.zero_point, row.label, domain.get(row.label, 1))
            for name, row in sorted(by_kind["table"].items())
        ),
        activations=tuple(sorted(by_kind["activation"])),
        hoisted={name: row.output for name, row in sorted(by_kind["begin"].items())},
        outputs=program.outputs,
        request_tables={name: row.output for name, row in sorted(by_kind["time"].items())},
    )


class Interpreter(Stepper):
    """Runs a program as it was when the interpreter was made."""

    def __init__(self, program: ProgramData) -> None:
        super().__init__(plan_of(program))
        if not program.has_weights:
            raise TfqcError("This program was captured without weights: it can be transformed, but not run.")
        self._modules_by_name = {name: _with_weights(program.module(name)) for name in program.functions}
        self._parameters_of = {
            name: [n.name for n in graph.nodes if n.op == "placeholder"] for name, graph in program.functions.items()
        }
        self.time = self._time if TIME in program.functions else None
        self.begin = self._begin if BEGIN in program.functions else None

    def _call(self, function: str, values: dict[str, Any]) -> Any:
        return self._modules_by_name[function](*(values[name] for name in self._parameters_of[function]))

    def step(self, /, **values: Any) -> Any:
        """One timestep."""
        return self._call(STEP, values)

    def _time(self, **values: Any) -> Any:
        return self._call(TIME, values)

    def _begin(self, **values: Any) -> Any:
        return self._call(BEGIN, values)

    def get_tensor(self, name: str) -> Tensor:
        return self._modules_by_name[STEP].get_buffer(buffer_name(name))

    def set_tensor(self, name: str, value: Tensor) -> None:
        setattr(self._modules_by_name[STEP], buffer_name(name), value)


_STORED = (torch.ops.tfqc.dequantize_weight.default, torch.ops.tfqc.dequantize_weight_int4.default)


def _with_weights(module: fx.GraphModule) -> fx.GraphModule:
    """Dequantize stored weights once, not at every call."""
    stored = [(number, node) for number, node in enumerate(module.graph.nodes) if is_call(node, *_STORED)]
    for number, node in stored:
        operands = fx.map_arg(node.kwargs, lambda n: module.get_buffer(str(n.target)))
        name = f"dequantized_{number}"
        module.register_buffer(name, node.target(**operands))
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
        module.graph.erase_node(node)
    if stored:
        module.recompile()
    return module


_CACHE: weakref.WeakKeyDictionary[fx.Graph, tuple[int, Interpreter]] = weakref.WeakKeyDictionary()


def interpreter(program: ProgramData) -> Interpreter:
    """An interpreter of the program as it is now; made anew only when the program has changed."""
    state = hash((
        *((n.op, n.name, n.target, repr(n.args), repr(n.kwargs)) for g in program.functions.values() for n in g.nodes),
        *((name, id(t), 0 if t.is_inference() else t._version) for name, t in program.tensors.items()),
        repr(sorted(program.table(RowSource).items())),
        repr(program.table(Schedule)),
        repr(program.outputs),
    ))  # fmt: skip
    cached = _CACHE.get(program.step)
    if cached is None or cached[0] != state:
        cached = (state, Interpreter(program))
        _CACHE[program.step] = cached
    return cached[1]
