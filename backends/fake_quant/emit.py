"""Emission of `model.py`: the step as straight-line code, a line for each operation, below the run time's source."""

from __future__ import annotations

import inspect
import pprint
import textwrap
from collections.abc import Iterator
from types import ModuleType

from torch import fx

from tfqc.artifact import Artifact
from tfqc.emission.bodies import DOCS, body
from tfqc.emission.expressions import expression, variable
from tfqc.emission.files import TIME_WEIGHTS, WEIGHTS, tensor_files
from tfqc.interpret import plan_of
from tfqc.ir.ops import op_name
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.runtime import buffer_name, ops, stepper


def emit(program: Program) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    files = tensor_files(program)
    texts = {"model.py": "\n".join(_model(program, TIME_WEIGHTS in files)) + "\n", "program.ir": render(program)}
    return Artifact(texts, dict(files))


def _model(program: Program, only_time: bool) -> Iterator[str]:
    title = f"{program.model}, compiled by tfqc."
    yield f'"""{title} Generated; needs torch and safetensors alone.'
    yield ""
    yield "Read `Model.step` first: it is what runs at every timestep. `Model.begin` runs once per image, `Model.time`"
    yield "for timesteps that are not in the schedule (PLAN). `load(directory)` makes the model."
    yield '"""'
    yield ""
    yield "from __future__ import annotations"
    yield ""
    yield "from collections.abc import Callable, Mapping"
    yield "from dataclasses import dataclass, field"
    yield "from pathlib import Path"
    yield "from typing import Any"
    yield ""
    yield "import torch"
    yield "import torch.nn.functional as F"
    yield "from safetensors.torch import load_file"
    yield "from torch import Tensor"
    yield ""
    yield "aten = torch.ops.aten"
    yield "# -- run time: rows of the schedule, tables built once per image " + "-" * 50
    yield ""
    yield _body(stepper)
    yield "# -- operations " + "-" * 99
    yield ""
    yield from _operations(program)
    yield "# -- the model " + "-" * 100
    yield ""
    yield f"PLAN = {pprint.pformat(plan_of(program), width=110, sort_dicts=True)}"
    yield ""
    yield ""
    yield "class Model(Stepper):"
    yield f'    """{program.model}: called with the inputs of the model that was captured."""'
    yield ""
    yield from textwrap.indent("\n".join(_init(program, only_time)), "    ").splitlines()
    for function in (STEP, BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield from textwrap.indent("\n".join(_function(program, function)), "    ").splitlines()
    yield ""
    yield ""
    yield "def load(directory: str | Path) -> Model:"
    yield '    """The model, from the directory that holds this file."""'
    yield "    return Model(Path(directory)).eval()"


def _body(module: ModuleType) -> str:
    """Source of a module behind its docstring and imports."""
    lines = inspect.getsource(module).splitlines()
    last = max(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    return "\n".join(lines[last + 1 :]).strip("\n") + "\n\n"


def _operations(program: Program) -> Iterator[str]:
    """Sources of the tfqc operations that the program uses."""
    used = {
        op_name(n.target).split(".")[1]
        for g in program.functions.values()
        for n in g.nodes
        if n.op == "call_function" and op_name(n.target).startswith("tfqc.")
    }
    if "quantize" in used:
        used.add("fake_quantize")
    if "dequantize_weight_int4" in used:
        used.add("dequantize_weight")
    names = [n for n in ("quantize", "dequantize") if n in used]
    for name in ["_rows"] * bool(names) + sorted(used):
        function = getattr(ops, name)
        source = inspect.getsource(function)
        yield source[source.index("def ") :]
        yield ""


def _init(program: Program, only_time: bool) -> Iterator[str]:
    yield "def __init__(self, directory: Path) -> None:"
    yield "    super().__init__(PLAN)"
    yield "    self.directory = directory"
    yield f'    for name, value in load_file(directory / "{WEIGHTS}").items():'
    yield "        self.register_buffer(buffer_name(name), value)"
    folded = [
        (function, node)
        for function in program.functions
        for node in program.nodes(function)
        if node.op == "call_function" and op_name(node.target).startswith("tfqc.dequantize_weight")
    ]
    if folded:
        yield "    # Weights are kept as integers on disk and turned into fp32 once."
    for _, node in folded:
        yield f'    self.register_buffer("{variable(node)}", {expression(node, _stored)}, persistent=False)'
    if only_time:
        yield "    self.time_is_loaded = False"


def _function(program: Program, function: str) -> Iterator[str]:
    graph = program.functions[function]
    parameters = [variable(n) for n in graph.nodes if n.op == "placeholder"]
    yield f"def {function}(self, {', '.join(f'{p}: Tensor' for p in parameters)}, **_: Tensor) -> Any:"
    yield f'    """{DOCS[function]}"""'
    if function == TIME and any(n.op == "get_attr" for n in graph.nodes):
        yield "    if not self.time_is_loaded:"
        yield "        device = str(next(self.buffers()).device)"
        yield f'        for name, value in load_file(self.directory / "{TIME_WEIGHTS}", device).items():'
        yield "            self.register_buffer(buffer_name(name), value, persistent=False)"
        yield "        self.time_is_loaded = True"
    yield from body(program, function, _stored)


def _stored(node: fx.Node) -> str | None:
    """Tensors are the module's buffers, weights too, which are dequantized in __init__."""
    if node.op == "get_attr":
        return f"self.{buffer_name(str(node.target))}"
    is_weight = node.op == "call_function" and op_name(node.target).startswith("tfqc.dequantize_weight")
    return f"self.{variable(node)}" if is_weight else None


__all__ = ["buffer_name", "emit"]
