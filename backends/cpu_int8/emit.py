"""Emission: `model.py` with the schedule of a step, a line for each kernel, and `kernels.cpp` beside it."""

from __future__ import annotations

import pprint
from collections.abc import Iterator

from torch import fx

from tfqc.analysis.rewrite import name_of
from tfqc.artifact import Artifact
from tfqc.backends.cpu_int8.build import source_of
from tfqc.backends.cpu_int8.support import KERNELS, is_concat, is_row, upsampling
from tfqc.expressions import arguments, expression, value, variable
from tfqc.fused import is_fused_quantize
from tfqc.interpret import plan_of
from tfqc.ir.ops import is_view, op_name
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.rows import Memory

WEIGHTS, TIME_WEIGHTS = "weights.safetensors", "time.safetensors"
# Files of kernels, by the kernels that they hold; the schedule's own comes first.
SOURCES = {
    "linear.cpp": {"linear"},
    "conv.cpp": {"conv"},
    "norm.cpp": {"norm"},
    "map.cpp": {"map", "add", "quantize_tokens"},
    "shape.cpp": {"concat", "upsample"},
    "attention.cpp": {"attention"},
}


def emit(program: Program, isa: str) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    read = {f: {str(n.target) for n in g.nodes if n.op == "get_attr"} for f, g in program.functions.items()}
    always = set().union(*(names for f, names in read.items() if f != TIME))
    only_time = read.get(TIME, set()) - always
    tensors = {WEIGHTS: {n: t for n, t in program.tensors.items() if n not in only_time}}
    if only_time:
        tensors[TIME_WEIGHTS] = {n: program.tensors[n] for n in only_time}
    texts = {
        "model.py": "\n".join(_model(program, isa)) + "\n",
        "kernels.cpp": source_of("schedule.cpp", *SOURCES),
        "program.ir": render(program),
    }
    return Artifact(texts, dict(tensors))


def _model(program: Program, isa: str) -> Iterator[str]:
    yield f'"""{program.model}, compiled by tfqc for CPUs in 8-bit integers. Generated.'
    yield ""
    yield "`step` is what runs at every timestep, a line for each kernel: k.KERNEL(value, operands...) appends it to"
    yield "the schedule and gives back the memory that it will write; w(name) is a tensor, t(name) packed weights."
    yield "`begin` runs once per image, `time` for timesteps that are not in the schedule. `load(directory)` makes the"
    yield "model."
    yield '"""'
    yield ""
    yield "from __future__ import annotations"
    yield ""
    yield "from pathlib import Path"
    yield "from typing import Any"
    yield ""
    yield "import torch"
    yield "import torch.nn.functional as F"
    yield "from torch import Tensor"
    yield ""
    yield "from tfqc.backends.cpu_int8.engine import Engine"
    yield "from tfqc.fused import fake_quantize"
    yield "from tfqc.ir.ops import *"
    yield "from tfqc.runtime import Plan, Table"
    yield ""
    yield "aten = torch.ops.aten"
    yield ""
    yield ""
    yield from _step(program)
    for function in (BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield ""
            yield from _plain(program, function)
    yield ""
    yield ""
    yield f"PLAN = {pprint.pformat(plan_of(program), width=110)}"
    yield ""
    yield "# Where values lie: the buffer, and the first and last line that needs it."
    memory = {name: (row.buffer, row.first, row.last) for name, row in program.table(Memory).items()}
    yield f"MEMORY: dict[str, tuple[int, int, int]] = {pprint.pformat(memory, width=110)}"
    yield ""
    yield "# Packed weights: their own shape, groups, whether columns are paired for GEGLU, bits."
    yield f"TILES: dict[str, tuple[tuple[int, ...], int, bool, int]] = {pprint.pformat(_tiles(program), width=110)}"
    yield ""
    yield ""
    yield "class Model(Engine):"
    yield f'    """{program.model}: called with the inputs of the model that was captured."""'
    yield ""
    yield "    lines = staticmethod(step)"
    for function in (BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield f"    def {function}(self, **inputs: Tensor) -> Any:"
            yield f'        """{DOCS[function]}"""'
            yield f"        return {function}(self.get_tensor, **inputs)"
    yield ""
    yield ""
    yield "def load(directory: str | Path) -> Model:"
    yield '    """The model, from the directory that holds this file."""'
    yield f'    return Model(Path(directory), PLAN, MEMORY, TILES, "{isa}").eval()'


DOCS = {
    STEP: "One timestep; `row` picks the rows of the tables.",
    BEGIN: "What is constant over one image, computed once.",
    TIME: "Temporal features in full precision, for timesteps that the tables do not hold.",
}


def _tiles(program: Program) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for node in program.step.nodes:
        if name_of(node) == "tfqc.unpack_tiles.default":
            tensor, _, shape, *rest = node.args
            assert isinstance(tensor, fx.Node)
            found[str(tensor.target)] = (tuple(shape), *rest)  # type: ignore[arg-type]
    return found


def _stored(node: fx.Node) -> str | None:
    if node.op == "get_attr":
        return f'w("{node.target}")'
    if name_of(node) == "tfqc.unpack_tiles.default":
        return f't("{node.args[0].target}")'  # type: ignore[union-attr]
    return None


def _step(program: Program) -> Iterator[str]:
    graph = program.step
    yield f"def step(k: Any, w: Any, t: Any, {_parameters(graph)}) -> Any:"
    yield f'    """{DOCS[STEP]}"""'
    module = ""
    for node in graph.nodes:
        if node.op == "output":
            yield f"    return {expression(node, _stored)}"
        if node.op != "call_function" or name_of(node) == "tfqc.unpack_tiles.default":
            continue
        origin = program.origins.get(node.name)
        if origin and origin.module and origin.module != module:
            module = origin.module
            yield f"    # {module}"
        yield f"    {variable(node)} = {_line(program, node)}"


def _line(program: Program, node: fx.Node) -> str:
    """One operation of a step: a kernel, a view, a call of torch, or plain arithmetic on sizes."""
    name, operation = f'"{node.name}"', op_name(node.target)
    if name_of(node) in KERNELS or is_row(node):
        return f"k.{operation.split('.')[1]}({name}, {arguments(node, _stored)})"
    if is_concat(program, node):
        return f"k.concat({name}, {', '.join(value(a, _stored) for a in node.args[0])})"  # type: ignore[union-attr]
    if factor := upsampling(node):
        return f"k.upsample({name}, {value(node.args[0], _stored)}, {factor})"
    if (program.tensor_type(node) is None and not is_view(node)) or operation in (
        "operator.getitem",
        "aten.sym_size.int",
    ):
        return expression(node, _stored)
    callee = operation if operation.startswith(("aten.", "torch.")) else operation.split(".")[1]
    return f"k.{'view' if is_view(node) else 'torch'}({name}, {callee}, {arguments(node, _stored)})"


def _plain(program: Program, function: str) -> Iterator[str]:
    graph = program.functions[function]
    yield f"def {function}(w: Any, {_parameters(graph)}) -> Any:"
    yield f'    """{DOCS[function]}"""'
    for node in graph.nodes:
        if node.op == "output":
            yield f"    return {expression(node, _stored)}"
        elif node.op == "call_function" and not is_fused_quantize(node):
            yield f"    {variable(node)} = {expression(node, _stored)}"


def _parameters(graph: fx.Graph) -> str:
    parameters = [f"{variable(n)}: Tensor" for n in graph.nodes if n.op == "placeholder"]
    return ", ".join(["*", *parameters, "**_: Tensor"])
