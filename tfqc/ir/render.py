"""A Program as text: one node per line, readable, diffable, and parsed back by `tfqc.ir.parse`.

    %silu_3: Bx1280xf32 = aten.silu.default(%linear_1)   {at="down_blocks.0.resnets.0" binding=["time"]}

Tensors are written `@name` where they are used and declared once with their type, as globals are in LLVM.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tfqc.errors import IRError
from tfqc.ir.calls import written
from tfqc.ir.cursor import TENSOR
from tfqc.ir.data import ProgramData
from tfqc.ir.match import returned_value
from tfqc.ir.ops import op_name
from tfqc.ir.types import TensorType, dtype_name

VERSION = 1


def render(program: ProgramData) -> str:
    """The whole program as IR text. Tensor values are not in it: `tfqc.ir.store` keeps them beside it."""
    return "\n".join(_lines(program)) + "\n"


def _lines(program: ProgramData) -> Iterator[str]:
    yield f"tfqc-ir {VERSION}"
    yield f"model {json.dumps(program.model)}"
    yield f"stage {program.stage}"
    if program.symbols:
        yield "symbols " + " ".join(f"{name}={value}" for name, value in sorted(program.symbols.items()))
    for item in program.inputs:
        domain = "" if item.domain is None else f" domain={item.domain}"
        yield f"input %{item.name} {item.role} {json.dumps(list(item.path))}: {item.type}{domain}"
    if program.arguments:
        yield f"arguments {_json(list(program.arguments))}"
    for path, value in sorted(program.constants.items()):
        yield f"constant {_json(list(path))} {_json(value)}"
    yield from (f"guard {_json(guard)}" for guard in program.guards)
    if program.outputs is not None:
        yield f"outputs {_json(program.outputs)}"
    for name in sorted(program.tensors):
        tensor = program.tensors[name]
        yield f"tensor @{_name(name)}: {TensorType(tensor.dtype, tuple(tensor.shape))}"
    for name, graph in program.functions.items():
        yield ""
        yield from _function(program, name, graph)
    for name, rows in sorted(program.tables.items()):
        outside = {key: row for key, row in rows.items() if not row.inline}
        if outside or not rows:
            yield ""
            yield f"table {name}"
            for key, row in sorted(outside.items()):
                yield f"  {_name(key)} {_json(row.to_json())}"


def _function(program: ProgramData, name: str, graph: fx.Graph) -> Iterator[str]:
    parameters = [n for n in graph.nodes if n.op == "placeholder"]
    yield f"func @{name}({', '.join(f'%{n.name}: {program.types[n.name]}' for n in parameters)}) {{"
    for node in parameters:
        if attributes := _attributes(program, node):
            yield f"  note %{node.name}{attributes}"
    for node in graph.nodes:
        if node.op == "call_function":
            yield f"  {render_node(program, node)}"
        elif node.op == "output":
            yield f"  return {render_value(returned_value(node))}"
        elif node.op not in ("placeholder", "get_attr"):
            raise IRError(f"%{node.name} is a {node.op}: the IR holds only operations.")
    yield "}"


def render_node(program: ProgramData, node: fx.Node) -> str:
    """One node as its line of IR text."""
    args, kwargs = written(node)
    arguments = [render_value(a) for a in args] + [f"{key}={render_value(value)}" for key, value in kwargs.items()]
    head = f"%{node.name}: {program.types[node.name]} = {op_name(node.target)}({', '.join(arguments)})"
    return head + _attributes(program, node)


def _attributes(program: ProgramData, node: fx.Node) -> str:
    parts: list[str] = []
    if origin := program.origins.get(node.name):
        if origin.module:
            parts.append(f"at={json.dumps(origin.module)}")
        if origin.source:
            parts.append(f"src={json.dumps(origin.source)}")
    for name, rows in sorted(program.tables.items()):
        row = rows.get(node.name)
        if row is not None and row.inline:
            parts.append(f"{name}={_json(row.to_json())}")
    return f"   {{{' '.join(parts)}}}" if parts else ""


def _name(name: str) -> str:
    """A tensor's or a row's name, in quotes if it has other characters than names in Python have."""
    return name if TENSOR.fullmatch(name) else json.dumps(name)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)


def render_value(value: Any) -> str:
    """A literal or a reference, as it stands in an argument list.

    Raises:
        IRError: the value has no literal form.
    """
    match value:
        case fx.Node(op="get_attr"):
            return f"@{_name(str(value.target))}"
        case fx.Node():
            return f"%{value.name}"
        case None | bool():
            return str(value)
        case int():
            return str(int(value))
        case float():
            return repr(value) if math.isfinite(value) else f"float({str(value)!r})".replace("'", "")
        case str():
            return json.dumps(value)
        case list():
            return "[" + ", ".join(map(render_value, value)) + "]"
        case tuple():
            return "(" + ", ".join(map(render_value, value)) + ("," if len(value) == 1 else "") + ")"
        case dict():
            return "{" + ", ".join(f"{json.dumps(k)}: {render_value(v)}" for k, v in value.items()) + "}"
        case torch.dtype():
            return f"dtype({dtype_name(value)})"
        case torch.device():
            return f"device({value})"
        case torch.layout() | torch.memory_format():
            return str(value)
        case slice():
            return f"slice({render_value(value.start)}, {render_value(value.stop)}, {render_value(value.step)})"
        case _:
            raise IRError(f"{value!r} ({type(value).__name__}) has no literal form in the IR.")
