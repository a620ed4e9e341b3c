"""half-precision: what is computed between kernels is f16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.infer import infer_type
from tfqc.ir.match import is_call
from tfqc.ir.ops import SHAPE_ONLY
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.views import Cast, Stores, stored_in
from tfqc.passing import LOSSY, Context, Numerics, Pass

# What works in f32 whatever it is given: quantizers that no kernel took, stored weights, reads of tables.
aten, ours = torch.ops.aten, torch.ops.tfqc
_WIDE = (
    ours.quantize.default, ours.quantize_dynamic.default, ours.dequantize.default, ours.dequantize_weight.default,
    ours.dequantize_weight_int4.default, ours.table_read.default, ours.table_decode.default,
    ours.table_decode_int4.default, ours.request_read.default,
)  # fmt: skip
_VALUES = {"codes", "x", "residual", "low", "up"}  # of kernels; their scales, zero points and biases stay f32
_FLOATS = (torch.float32, torch.float16)


@dataclass(frozen=True)
class HalfPrecision(Pass):
    """Compute @step in f16: kernels store it, torch's operations read it. Inputs and outputs stay f32."""

    name: ClassVar[str] = "half-precision"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step, operation by operation: each gets operands of the type that it reads."""
        edit = Rewriter(program)
        casts: dict[tuple[fx.Node | str, torch.dtype], fx.Node] = {}
        halves: set[fx.Node] = set()  # whose type is another than it was
        for node in program.nodes():
            if node.op == "output":
                for value in node.all_input_nodes:
                    node.replace_input_with(value, _cast(edit, node, value, torch.float32, casts))
            if node.op != "call_function" or stored_in(node):  # readers of a stored tensor find it cast already
                continue
            before = (node.args, node.kwargs)
            for value in node.all_input_nodes:
                node.replace_input_with(value, _cast(edit, node, value, _wanted(program, node, value), casts))
            stored, cast = Stores.of(node), Cast.of(node)
            if stored is not None and stored.out == "f32":
                node.update_kwarg("out", "f16")
            elif cast is not None and cast.dtype is torch.float32 and not _was_half(program, node, halves):
                node.update_kwarg("dtype", torch.float16)
            narrowed = any(n in halves for n in node.all_input_nodes)
            if narrowed or (node.args, node.kwargs) != before:
                program.types[node.name] = infer_type(program, node)  # its readers are visited after it
                halves.add(node)
        program.prune()


def _was_half(program: Program, cast: fx.Node, halves: set[fx.Node]) -> bool:
    """True for a cast of what was f16 before: one that is meant, or that this pass made when it ran before."""
    value = cast.all_input_nodes[0]
    type_ = program.types[value.name]
    return isinstance(type_, TensorType) and type_.dtype is torch.float16 and value not in halves


def _wanted(program: Program, node: fx.Node, value: fx.Node) -> torch.dtype | None:
    """The floating point type in which an operation reads a value; None if it does not read it."""
    if any(_is_complex(program, n) for n in (node, *node.all_input_nodes)):
        return torch.float32  # there are next to no operations on complex numbers of half precision
    if node.target in SHAPE_ONLY or Cast.of(node):
        return None
    if Stores.of(node):
        read_as = {name for name, given in node.kwargs.items() if given is value}
        return torch.float16 if read_as & _VALUES else torch.float32
    return torch.float32 if is_call(node, *_WIDE) else torch.float16


def _is_complex(program: Program, node: fx.Node) -> bool:
    type_ = program.types[node.name]
    return isinstance(type_, TensorType) and type_.dtype.is_complex


def _cast(
    edit: Rewriter, reader: fx.Node, value: fx.Node, dtype: torch.dtype | None, casts: dict[Any, fx.Node]
) -> fx.Node:
    """The value in a floating point type; itself if it has that, or is no floating point tensor."""
    program = edit.program
    type_ = program.types[value.name]
    if dtype is None or not isinstance(type_, TensorType) or type_.dtype not in _FLOATS or type_.dtype is dtype:
        return value
    if stored := stored_in(value):
        if (stored, dtype) not in casts:
            narrow = program.tensors[stored].to(dtype)
            casts[stored, dtype] = program.tensor_node(program.add_tensor(f"{stored}.f16", narrow))
        return casts[stored, dtype]
    if (value, dtype) not in casts:
        short = "f16" if dtype is torch.float16 else "f32"
        before = reader if value.op == "placeholder" else value.next
        name = f"{value.name}_{short}"
        casts[value, dtype] = edit.insert(before, aten.to.dtype, value, dtype, name=name, like=value)
    return casts[value, dtype]
