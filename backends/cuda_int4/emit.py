"""Emission: `model.py` with a line for each kernel of a step, `kernels.cu` beside it, weights in fragment order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, fx

from tfqc.backends.cuda_int4.lines import Lines
from tfqc.backends.cuda_int4.runtime import pack
from tfqc.backends.cuda_int4.runtime.specialise import source
from tfqc.backends.cuda_int4.tensor_cores import is_step_row
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.python.bodies import DOCS, body
from tfqc.codegen.python.expressions import Stored, expression
from tfqc.codegen.python.files import WEIGHTS, tensor_files
from tfqc.codegen.python.module import ModuleWriter, engine_class, helpers, parameters
from tfqc.codegen.python.wrapping import signature
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType
from tfqc.ir.views import Product


def emit(program: Program, arch: str) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    lines = Lines(program, arch)
    model = _Writer(program, lines).model()
    files = tensor_files(program)
    files[WEIGHTS] = dict(_packed(files[WEIGHTS], lines))
    kernels = list(lines.selection.kernels.values())
    texts = {"model.py": model, "kernels.cu": source(kernels), "program.ir": render(program)}
    return Artifact(texts, dict(files), {"kernels": lines.used})


def _packed(tensors: Mapping[str, Tensor], lines: Lines) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name, codes of products packed and their sums beside them."""
    codes = {tensor for tensor, _ in lines.packed.values()}
    yield from ((name, tensor) for name, tensor in tensors.items() if name not in codes)
    for name, (tensor, kernel) in lines.packed.items():
        flat = tensors[tensor].flatten(1) if kernel.window is None else pack.window_codes(tensors[tensor])
        yield f"{name}.packed", pack.pack(flat, kernel.mode, kernel.tile.n, kernel.paired)
        yield f"{name}.sums", pack.weight_sums(flat, kernel.tile.n, kernel.paired, kernel.group)


class _Writer:
    """Writes `model.py`."""

    def __init__(self, program: Program, lines: Lines) -> None:
        self.program, self.lines = program, lines
        # What needs tensors alone is computed when the model is loaded.
        self._constant = [n for f in (STEP, BEGIN) if f in program.functions for n in _constants(program.functions[f])]

    def model(self) -> str:
        """The file."""
        program = self.program
        step = list(self._step())  # which selects the kernels
        kernels = "".join(f"    {_written(kernel)},\n" for kernel in self.lines.selection.kernels.values())
        return ModuleWriter(
            program,
            "for CUDA devices in 4-bit integers",
            "`step` is what runs at every timestep: k.product, k.quantize and k.quantize_tokens launch the kernel of "
            "that name, everything else is torch in f16; w(name) is a tensor. `begin` runs once per image, `time` for "
            "timesteps that are not in the schedule. `load(directory)` makes the model, which builds `kernels.cu`.",
            [
                "from tfqc.backends.cuda_int4.runtime.engine import Engine",
                "from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Quantize, Tile, Window",
            ],
            [step, *(self._plain(f) for f in (BEGIN, TIME) if f in program.functions), self._constants()],
            engine_class(program, ["lines = staticmethod(step)", "constants = staticmethod(constants)"]),
            "PLAN, KERNELS, BATCHED",
            {
                "KERNELS": ("What kernels.cu holds.", f"[\n{kernels}]"),
                "BATCHED": ("Which dimension of a parameter of `step` is the batch.", self._batched()),
            },
            "kernels.cu",
        ).text()

    def _step(self) -> Iterator[str]:
        graph = self.program.step
        k, w = helpers(graph, "kw")
        stored = self._stored(w)

        def passed(node: fx.Node) -> str | None:
            done = (is_step_row(self.program, node) and _only_biases(node)) or self.lines.is_done(node)
            return "" if done else stored(node)

        yield from signature("step", [f"{k}: Any", f"{w}: Any", "/", *parameters(graph)], "Any")
        yield f'    """{DOCS[STEP]}"""'
        yield from body(self.program, STEP, passed, lambda node: self.lines.write(node, k, stored))

    def _plain(self, function: str) -> Iterator[str]:
        graph = self.program.functions[function]
        _, w = helpers(graph, "kw")
        yield from signature(function, [f"{w}: Any", "/", *parameters(graph)], "Any")
        yield f'    """{DOCS[function]}"""'
        yield from body(self.program, function, self._stored(w))

    def _constants(self) -> Iterator[str]:
        yield "def constants(w: Any, /) -> dict[str, Tensor]:"
        yield '    """What needs no input, computed when the model is loaded: weights that torch reads."""'
        yield "    made = {}"
        for node in self._constant:
            yield f'    made["{node.name}"] = {expression(node, self._of_constant)}'
        read = [n.name for n in self._constant if any(user not in self._constant for user in n.users)]
        yield f"    return {{name: made[name] for name in {read!r}}}"

    def _of_constant(self, node: fx.Node) -> str:
        return f'made["{node.name}"]' if node in self._constant else f'w("{node.target}")'

    def _stored(self, w: str) -> Stored:
        def stored(node: fx.Node) -> str | None:
            if node.op == "get_attr":
                return f'{w}("{node.target}")'
            return f'{w}("{node.name}")' if node in self._constant else None

        return stored

    def _batched(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for node in self.program.step.nodes:
            type_ = self.program.types.get(node.name)
            if node.op == "placeholder" and isinstance(type_, TensorType) and "B" in type_.shape:
                found[node.name] = type_.shape.index("B")
        return found


def _constants(graph: fx.Graph) -> dict[fx.Node, None]:
    """Values that need tensors alone, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        operands = node.all_input_nodes if node.op == "call_function" else []
        if operands and all(n.op == "get_attr" or n in found for n in operands):
            found[node] = None
    return found


def _only_biases(read: fx.Node) -> bool:
    """True for a read that products do themselves."""
    return all((product := Product.of(u)) is not None and product.bias is read for u in read.users)


def _written(item: Any) -> str:
    """A dataclass as the call that makes it, without what is as usual."""
    shown = [f for f in fields(item) if getattr(item, f.name) != f.default]
    inner = [getattr(item, f.name) for f in shown]
    texts = [_written(i) if hasattr(i, "__dataclass_fields__") else repr(i) for i in inner]
    return f"{type(item).__name__}({', '.join(f'{f.name}={t}' for f, t in zip(shown, texts, strict=True))})"
