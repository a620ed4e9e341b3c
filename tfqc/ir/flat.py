"""A program as one module of plain tensors: what other tools take, which know no timesteps and no requests.

`@begin` and `@time` run at every call, and a timestep finds its row in the schedule by itself: the nearest one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.errors import TfqcError
from tfqc.ir.data import BEGIN, STEP, TIME, ProgramData
from tfqc.ir.interpret import plan_of
from tfqc.ir.match import is_call
from tfqc.ir.ops import DEFINED
from tfqc.runtime.call import EACH
from tfqc.runtime.plan import as_called

Instead = Mapping[Any, Callable[..., Any]]


def flat_module(program: ProgramData, instead: Instead | None = None, one_row: bool = False) -> torch.nn.Module:
    """A module that takes the program's arguments by name, timesteps as [B], and gives the tensors of @step.

    Args:
        instead: what runs in place of an operation. Operations of tfqc run what they are composed of otherwise.
        one_row: the row of the first timestep serves all images of a call.

    Raises:
        TfqcError: the program has no weights.
    """
    graph = fx.Graph()
    arguments = {name: graph.placeholder(name) for name in dict.fromkeys(i.path[0] for i in program.inputs)}
    values: dict[str, Any] = {}
    for item in program.inputs:
        value = arguments[item.path[0]]
        for key in item.path[1:]:
            if key == EACH:  # rows of one tensor
                break
            value = graph.call_function(operator.getitem, (value, int(key) if key.isdigit() else key))
        values[item.name] = value
    graph.output(graph.call_module("flat", kwargs=values))
    return fx.GraphModule({"flat": _Flat(program, instead or {}, one_row)}, graph)


def nested(program: ProgramData, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the name of their input as arguments of the model, which may hold them in containers."""
    found: dict[str, Any] = {}
    for item in program.inputs:
        inner = found
        for key in item.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[item.path[-1]] = values[item.name]
    return {key: _listed(value) for key, value in found.items()}


def _listed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if EACH in value:
        return value[EACH]
    items = {key: _listed(inner) for key, inner in value.items()}
    return list(items.values()) if all(key.isdigit() for key in items) else items


class _Flat(torch.nn.Module):
    schedule: Tensor

    def __init__(self, program: ProgramData, instead: Instead, one_row: bool) -> None:
        super().__init__()
        if not program.has_weights:
            raise TfqcError(f"{program.model} was captured without weights, so it cannot be exported: load them first.")
        self.plan, self.instead, self.one_row = plan_of(program), instead, one_row
        modules = {name: program.module(name) for name in program.functions}
        _read_one_row(modules[STEP])
        self.functions = torch.nn.ModuleDict(modules)
        times = as_called(self.plan.timesteps, self.plan.time.dtype) if self.plan.time else []
        self.register_buffer("schedule", torch.tensor(times, dtype=torch.float32))

    def forward(self, **values: Tensor) -> Any:
        """One call."""
        plan = self.plan
        if plan.time and (plan.row or plan.label_rows):
            given = values[plan.time.name].to(torch.float32)
            given = given[:1] if self.one_row else given
            rows = (given[:, None] - self.schedule[None, :]).abs().argmin(1)
            values |= {k: rows * n + values[of] for k, (of, n) in plan.label_rows.items()}
            values |= {plan.row: rows} if plan.row else {}
        if plan.hoisted:
            found = self._call(BEGIN, values)
            values |= {name: found[i] for name, i in plan.hoisted.items()}
        if plan.request_tables:
            found = self._call(TIME, values)
            values |= {name: found[i] for name, i in plan.request_tables.items()}
        return self._call(STEP, values)

    def _call(self, function: str, values: Mapping[str, Tensor]) -> Any:
        module = self.functions[function]
        assert isinstance(module, fx.GraphModule)
        return _Composed(module, self.instead).run(
            *(values[n.name] for n in module.graph.nodes if n.op == "placeholder")
        )


class _Composed(fx.Interpreter):
    """Runs a function with what `instead` says, and operations of tfqc as what they are composed of."""

    def __init__(self, module: fx.GraphModule, instead: Instead) -> None:
        super().__init__(module)
        self._instead = instead

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self._instead:
            return self._instead[target](*args, **kwargs)
        if isinstance(target, torch._ops.OpOverload) and target.namespace == "tfqc":
            name = target._overloadpacket.__name__
            return next(getattr(m, name) for m in DEFINED if hasattr(m, name))(*args, **kwargs)
        return super().call_function(target, args, kwargs)


def _read_one_row(step: fx.GraphModule) -> None:
    """Tables of a request are not filled here: `@time` gives the row of the call's own timestep."""
    for node in list(step.graph.nodes):
        if is_call(node, torch.ops.tfqc.request_read.default):
            node.replace_all_uses_with(node.kwargs.get("table") or node.args[0])
            step.graph.erase_node(node)
