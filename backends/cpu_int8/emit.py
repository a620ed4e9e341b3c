"""Emission: `model.py` with the lines of a step, a line for each kernel, and `kernels.cpp` beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from tfqc.backends.cpu_int8.runtime.build import source_of
from tfqc.backends.cpu_int8.support import images_of, is_concat, is_own, is_row, upsampling
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.python.bodies import DOCS, body
from tfqc.codegen.python.expressions import Stored, arguments, expression, value
from tfqc.codegen.python.files import tensor_files
from tfqc.codegen.python.module import ModuleWriter, engine_class, helpers, parameters
from tfqc.codegen.python.wrapping import signature
from tfqc.ir.match import is_call, item_of
from tfqc.ir.ops import is_view, op_name
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.rows import Memory
from tfqc.ir.types import ScalarType
from tfqc.ir.views import Tiles, Upsample

# Which file holds the kernel of an operation.
SOURCES = {
    "qlinear": "linear.cpp", "qconv": "conv.cpp", "norm": "norm.cpp", "map": "map.cpp", "gated_add": "map.cpp",
    "quantize_tokens": "map.cpp", "concat": "shape.cpp", "upsample": "shape.cpp", "attention": "attention.cpp",
}  # fmt: skip


def emit(program: Program, isa: str) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    kernels = _kernels(program)
    extra = {"linear.cpp"} if "qconv" in kernels.values() else set[str]()  # what a convolution of one by one is
    texts = {
        "model.py": _model(program, isa).text(),
        "kernels.cpp": source_of("schedule.cpp", *sorted({SOURCES[kernel] for kernel in kernels.values()} | extra)),
        "program.ir": render(program),
    }
    return Artifact(texts, dict(tensor_files(program)), {"kernels": kernels})


def _kernels(program: Program) -> dict[str, str]:
    """The kernel of each value that one computes."""
    found = {n.name: _method(program, n) for n in program.step.nodes}
    return {name: kernel for name, kernel in found.items() if kernel in SOURCES}


def _method(program: Program, node: fx.Node) -> str:
    """The recorder's method for an operation."""
    if is_own(node) or is_row(node):
        return op_name(node.target).split(".")[1]
    if is_concat(program, node):
        return "concat"
    if upsampling(node):
        return "upsample"
    return "view" if is_view(node) else "torch"


def _model(program: Program, isa: str) -> ModuleWriter:
    memory = {name: (row.buffer, row.first, row.last) for name, row in program.table(Memory).items()}
    return ModuleWriter(
        program,
        "for CPUs in 8-bit integers",
        "`step` is what runs at every timestep, a line for each kernel: k.KERNEL(value, operands...) appends it to the "
        "recording and gives back the memory that it will write; w(name) is a tensor, t(name) packed weights. `begin` "
        "runs once per image, `time` for timesteps that are not in the schedule. `load(directory)` makes the model.",
        ["from tfqc.backends.cpu_int8.runtime.engine import Engine"],
        [_step(program), *(_plain(program, f) for f in (BEGIN, TIME) if f in program.functions)],
        engine_class(program, ["lines = staticmethod(step)"]),
        f'PLAN, MEMORY, TILES, "{isa}"',
        {
            "MEMORY": ("Where values lie: the buffer, and the first and last line that needs it.", memory),
            "TILES": (
                "Packed weights: their own shape, groups, whether columns are paired for GEGLU, bits.",
                _tiles(program),
            ),
        },
        "kernels.cpp",
    )


def _tiles(program: Program) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for node in program.step.nodes:
        if tiles := Tiles.of(node):
            found[str(tiles.packed.target)] = (tuple(tiles.shape), tiles.groups, tiles.paired, tiles.bits)
    return found


def _stored(w: str, t: str = "") -> Stored:
    def stored(node: fx.Node) -> str | None:
        if node.op == "get_attr":
            return f'{w}("{node.target}")'
        tiles = Tiles.of(node)
        return None if tiles is None else f'{t}("{tiles.packed.target}")'

    return stored


def _step(program: Program) -> Iterator[str]:
    graph = program.step
    k, w, t = helpers(graph, "kwt")
    stored = _stored(w, t)
    yield from signature("step", [f"{k}: Any", f"{w}: Any", f"{t}: Any", "/", *parameters(graph)], "Any")
    yield f'    """{DOCS[STEP]}"""'
    yield from body(program, STEP, stored, lambda node: _line(program, node, k, stored), fused=False)


def _line(program: Program, node: fx.Node, k: str, stored: Stored) -> str:
    """One operation of a step: a kernel, a view, a call of torch, or plain arithmetic on sizes."""
    operation, method = op_name(node.target), _method(program, node)
    match method:
        case "concat":
            operands = ", ".join(value(tensor, stored) for tensor in images_of(node))
        case "upsample":
            operands = f"{value(Upsample(node).input, stored)}, {upsampling(node)}"
        case "view" | "torch":
            scalar = isinstance(program.type(node), ScalarType)
            if scalar or item_of(node) or is_call(node, torch.ops.aten.sym_size.int):
                return expression(node, stored)
            callee = operation if operation.startswith(("aten.", "torch.")) else operation.split(".")[1]
            operands = f"{callee}, {arguments(node, stored)}"
        case _:
            operands = arguments(node, stored, by_name=True)
    return f'{k}.{method}("{node.name}", {operands})'


def _plain(program: Program, function: str) -> Iterator[str]:
    graph = program.functions[function]
    _, w, _ = helpers(graph, "kwt")
    yield from signature(function, [f"{w}: Any", "/", *parameters(graph)], "Any")
    yield f'    """{DOCS[function]}"""'
    yield from body(program, function, _stored(w))
