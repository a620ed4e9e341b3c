"""Emission of `model.py`: the step as straight-line code, a line for each operation."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from torch import fx

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.python.bodies import DOCS, body
from tfqc.codegen.python.expressions import expression, variable
from tfqc.codegen.python.files import TIME_WEIGHTS, WEIGHTS, tensor_files
from tfqc.codegen.python.module import ModuleWriter
from tfqc.codegen.python.names import harmless
from tfqc.codegen.python.wrapping import signature
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.views import StoredWeight
from tfqc.runtime import buffer_name


def emit(program: Program) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    files = tensor_files(program)
    model = ModuleWriter(
        program,
        "",
        "Read `Model.step` first: it is what runs at every timestep. `Model.begin` runs once per image, `Model.time` "
        "for timesteps that are not in the schedule (PLAN). `load(directory)` makes the model.",
        ["from safetensors.torch import load_file", "from tfqc.runtime import Stepper, buffer_name"],
        [],
        _class(program, TIME_WEIGHTS in files),
        "PLAN",
    )
    return Artifact({"model.py": model.text(), "program.ir": render(program)}, dict(files))


def _class(program: Program, only_time: bool) -> Iterator[str]:
    yield "class Model(Stepper):"
    yield f'    """{harmless(program.model)}: called with the inputs of the model that was captured."""'
    yield ""
    yield from textwrap.indent("\n".join(_init(program, only_time)), "    ").splitlines()
    for function in (STEP, BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield from textwrap.indent("\n".join(_function(program, function)), "    ").splitlines()


def _init(program: Program, only_time: bool) -> Iterator[str]:
    yield "def __init__(self, directory: Path, plan: Plan) -> None:"
    yield "    super().__init__(plan)"
    yield "    self.directory = directory"
    yield f'    for name, value in load_file(directory / "{WEIGHTS}").items():'
    yield "        self.register_buffer(buffer_name(name), value)"
    folded = [
        (function, node) for function in program.functions for node in program.nodes(function) if StoredWeight.of(node)
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
    yield from signature(function, ["self", *(f"{p}: Tensor" for p in parameters), "**_: Tensor"], "Any")
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
    return f"self.{variable(node)}" if StoredWeight.of(node) else None
