"""Emission: `model.py` with a line for each kernel of a step, `kernels.cu` beside it, weights in fragment order."""

from __future__ import annotations

import pprint
from collections.abc import Iterator
from dataclasses import fields
from itertools import count
from typing import Any

from torch import Tensor, fx

from tfqc.analysis.rewrite import name_of, operands
from tfqc.analysis.tensor_cores import is_step_row, window_of
from tfqc.artifact import Artifact
from tfqc.backends.cuda_int4 import pack
from tfqc.backends.cuda_int4.selection import PRODUCTS, Selection, is_image
from tfqc.backends.cuda_int4.specialise import Gemm, source
from tfqc.emission.bodies import DOCS, body
from tfqc.emission.expressions import Stored, expression, value, variable
from tfqc.emission.files import WEIGHTS, tensor_files
from tfqc.interpret import plan_of
from tfqc.ir.program import BEGIN, STEP, TIME, Program
from tfqc.ir.render import render
from tfqc.ir.types import TensorType

_QUANTIZERS = {"tfqc.map.default", "tfqc.quantize_tokens.default"}


def emit(program: Program, arch: str) -> Artifact:
    """Files of a lowered program. Tensors that only @time reads lie in `time.safetensors`."""
    writer = _Writer(program, arch)
    model = "\n".join(writer.model()) + "\n"
    files = tensor_files(program)
    files[WEIGHTS] = writer.packed(files[WEIGHTS])
    kernels = list(writer.selection.kernels.values())
    texts = {"model.py": model, "kernels.cu": source(kernels), "program.ir": render(program)}
    return Artifact(texts, dict(files), {"kernels": writer.used})


class _Writer:
    """Writes a program down; `used` says which kernel computes which value."""

    def __init__(self, program: Program, arch: str) -> None:
        self.program, self.selection = program, Selection(program, arch)
        self.used: dict[str, str] = {}
        self._weights: dict[str, Gemm] = {}  # by the tensor of codes
        self._constant = {f: _constants(program.functions[f]) for f in (STEP, BEGIN) if f in program.functions}

    # -- tensors --------------------------------------------------------------------------------------------------

    def packed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors with codes of products packed, their sums beside them."""
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            kernel = self._weights.get(name)
            if kernel is None:
                found[name] = tensor
                continue
            codes = tensor.flatten(1) if kernel.window is None else pack.window_codes(tensor)
            weight = _weight(name)
            found[f"{weight}.packed"] = pack.pack(codes, kernel.mode, kernel.tile.n, kernel.paired)
            found[f"{weight}.sums"] = pack.weight_sums(codes, kernel.tile.n, kernel.paired)
        return found

    # -- model.py -------------------------------------------------------------------------------------------------

    def model(self) -> Iterator[str]:
        """Its lines."""
        program = self.program
        step = list(self._step())  # which selects the kernels
        yield f'"""{program.model}, compiled by tfqc for CUDA devices in 4-bit integers. Generated.'
        yield ""
        yield "`step` is what runs at every timestep: k.product, k.quantize and k.quantize_tokens launch the kernel of that"
        yield "name, everything else is torch in f16; w(name) is a tensor. `begin` runs once per image, `time` for timesteps"
        yield "that are not in the schedule. `load(directory)` makes the model; `kernels.cu` is built on first use."
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
        yield "from tfqc.backends.cuda_int4.engine import Engine"
        yield "from tfqc.backends.cuda_int4.specialise import Epilogue, Gemm, Quantize, Tile, Window"
        yield "from tfqc.emission.fused import fake_quantize"
        yield "from tfqc.ir.ops import *"
        yield "from tfqc.ir.kernel_ops import channels_last, plain"
        yield "from tfqc.runtime import Plan, Table"
        yield ""
        yield "aten = torch.ops.aten"
        yield ""
        yield ""
        yield from step
        for function in (BEGIN, TIME):
            if function in program.functions:
                yield ""
                yield ""
                yield from self._plain(function)
        yield ""
        yield ""
        yield from self._constants()
        yield ""
        yield ""
        yield f"PLAN = {pprint.pformat(plan_of(program), width=110)}"
        yield ""
        yield "KERNELS = ["
        yield from (f"    {_written(kernel)}," for kernel in self.selection.kernels.values())
        yield "]"
        yield ""
        yield "# Which dimension of a parameter of `step` is the batch."
        yield f"BATCHED = {pprint.pformat(self._batched(), width=110)}"
        yield ""
        yield ""
        yield "class Model(Engine):"
        yield f'    """{program.model}: called with the inputs of the model that was captured."""'
        yield ""
        yield "    lines = staticmethod(step)"
        yield "    constants = staticmethod(constants)"
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
        yield "    return Model(Path(directory), PLAN, KERNELS, BATCHED).eval()"

    def _step(self) -> Iterator[str]:
        graph = self.program.step
        k, w = _helpers(graph)
        stored = self._stored(STEP, w)

        def passed(node: fx.Node) -> str | None:
            return "" if is_step_row(self.program, node) and _only_biases(node) else stored(node)

        yield f"def step({k}: Any, {w}: Any, /, {_parameters(graph)}) -> Any:"
        yield f'    """{DOCS[STEP]}"""'
        yield from body(self.program, STEP, passed, lambda node: self._line(node, k, stored))

    def _plain(self, function: str) -> Iterator[str]:
        graph = self.program.functions[function]
        _, w = _helpers(graph)
        yield f"def {function}({w}: Any, /, {_parameters(graph)}) -> Any:"
        yield f'    """{DOCS[function]}"""'
        yield from body(self.program, function, self._stored(function, w))

    def _constants(self) -> Iterator[str]:
        yield "def constants(w: Any, /) -> dict[str, Tensor]:"
        yield '    """What needs no input, computed when the model is loaded: weights that torch reads."""'
        yield "    made = {}"
        for nodes in self._constant.values():
            for node in nodes:
                line = expression(node, lambda n: f'made["{n.name}"]' if n in nodes else f'w("{n.target}")')
                yield f'    made["{node.name}"] = {line}'
        read = [n.name for nodes in self._constant.values() for n in nodes if any(u not in nodes for u in n.users)]
        yield f"    return {{name: made[name] for name in {read!r}}}"

    def _stored(self, function: str, w: str) -> Stored:
        constant = self._constant.get(function, {})

        def stored(node: fx.Node) -> str | None:
            if node.op == "get_attr":
                return f'{w}("{node.target}")'
            return f'{w}("{node.name}")' if node in constant else None

        return stored

    # -- lines of a step ------------------------------------------------------------------------------------------

    def _line(self, node: fx.Node, k: str, stored: Stored) -> str:
        """One operation of a step: a kernel, or torch."""
        name = name_of(node)
        if name in PRODUCTS:
            return self._product(node, k, stored)
        if name not in _QUANTIZERS:
            return expression(node, stored)
        x = _pixels_last(operands(node)["x"], is_image(node), stored)
        if name == "tfqc.quantize_tokens.default":
            return f'{k}.quantize_tokens("{self._use(node, self.selection.tokens(node).name)}", {x})'
        has = operands(node)
        scales = f"{_name(has['out_scale'])}, {_name(has['out_zero_point'])}"
        kernels = [self.selection.quantizer(node, windowed) for windowed in self._layouts(node)]
        calls = [f'{k}.quantize("{self._use(node, kernel.name)}", {x}, {scales})' for kernel in kernels]
        return ", ".join(calls)

    def _layouts(self, codes: fx.Node) -> list[bool]:
        """How the products want a value's codes: as rows (False), as images with a border (True), or both."""
        return sorted({window_of(self.program, user) is not None for user in codes.users})

    def _product(self, node: fx.Node, k: str, stored: Stored) -> str:
        has, kernel = operands(node), self.selection.product(node)
        image = name_of(node) == "tfqc.qconv.default"
        weight = str(has["weight"].target)
        self._weights[weight] = kernel
        codes = value(has["codes"], stored)
        if name_of(has["codes"]) == "tfqc.map.default" and len(layouts := self._layouts(has["codes"])) > 1:
            codes += f"[{layouts.index(kernel.window is not None)}]"
        operand = has["scale"]
        if isinstance(operand, fx.Node) and operand.op == "get_attr":
            scales = f"({_name(operand)}, {_name(has['zero_point'])})"
        else:
            scales = f"({value(operand, stored)}, {value(has['zero_point'], stored)})"
        parts = [f'"{self._use(node, kernel.name)}"', codes, f'"{_weight(weight)}"', scales]
        if (bias := has["bias"]) is not None:
            parts.append(f"bias={_name(bias if bias.op == 'get_attr' else bias.args[0])}")
        if has["residual"] is not None:
            parts.append(f"residual={_pixels_last(has['residual'], image, stored)}")
        if has["out_scale"] is not None:
            parts.append(f"out_scales=({_name(has['out_scale'])}, {_name(has['out_zero_point'])})")
        return f"{k}.product({', '.join(parts)})" + (".permute(0, 3, 1, 2)" if image and kernel.epilogue.out == "f16" else "")

    def _use(self, node: fx.Node, kernel: str) -> str:
        self.used[node.name] = kernel
        return kernel

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
        if node.op == "call_function" and node.all_input_nodes:
            if all(n.op == "get_attr" or n in found for n in node.all_input_nodes):
                found[node] = None
    return found


def _only_biases(read: fx.Node) -> bool:
    """True for a read that products do themselves."""
    return all(name_of(u) in PRODUCTS and operands(u)["bias"] is read for u in read.users)


def _pixels_last(image: fx.Node, is_image: bool, stored: Stored) -> str:
    return value(image, stored) + (".permute(0, 2, 3, 1)" if is_image else "")


def _name(tensor: fx.Node) -> str:
    return f'"{tensor.target}"'


def _weight(codes: str) -> str:
    return codes.removesuffix(".codes")


def _helpers(graph: fx.Graph) -> tuple[str, str]:
    """How kernels and tensors are called: k and w, but where a value has that name."""
    taken = {variable(n) for n in graph.nodes}
    k, w = (next(n for i in count() if (n := letter + "_" * i) not in taken) for letter in "kw")
    return k, w


def _parameters(graph: fx.Graph) -> str:
    parameters = [f"{variable(n)}: Tensor" for n in graph.nodes if n.op == "placeholder"]
    return ", ".join(["*", *parameters, "**_: Tensor"])


def _written(item: Any) -> str:
    """A dataclass as the call that makes it, without what is as usual."""
    shown = [f for f in fields(item) if getattr(item, f.name) != f.default]
    inner = [getattr(item, f.name) for f in shown]
    texts = [_written(i) if hasattr(i, "__dataclass_fields__") else repr(i) for i in inner]
    return f"{type(item).__name__}({', '.join(f'{f.name}={t}' for f, t in zip(shown, texts, strict=True))})"
