"""half-precision: what is computed between kernels is f16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.analysis.rewrite import changed, name_of, operands, retype, stores
from tfqc.ir.ops import SHAPE_ONLY
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.passing import LOSSY, Context, Numerics, Pass

# What works in f32 whatever it is given: quantizers that no kernel took, stored weights, reads of tables.
_WIDE = ("tfqc.quantize", "tfqc.dequantize", "tfqc.table_", "tfqc.request_read")
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
        casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        halves: set[fx.Node] = set()  # whose type is another than it was
        for node in program.nodes():
            if node.op == "output":
                for value in node.all_input_nodes:
                    node.replace_input_with(value, _cast(program, node, value, torch.float32, casts))
            if node.op != "call_function":
                continue
            before = node.args
            for value in node.all_input_nodes:
                node.replace_input_with(value, _cast(program, node, value, _wanted(node, value), casts))
            if stores(node) and operands(node)["out"] == "f32":
                node.args = changed(node, out="f16")
            elif (
                name_of(node) == "aten.to.dtype"
                and node.args[1] is torch.float32
                and not _was_half(program, node, halves)
            ):
                node.args = (node.args[0], torch.float16, *node.args[2:])
            narrowed = any(n in halves for n in node.all_input_nodes)
            if narrowed or node.args != before:
                retype(program, node)
                halves.add(node)
        program.prune()


def _was_half(program: Program, cast: fx.Node, halves: set[fx.Node]) -> bool:
    """True for a cast of what was f16 before: one that is meant, or that this pass made when it ran before."""
    value = cast.all_input_nodes[0]
    type_ = program.types[value.name]
    return isinstance(type_, TensorType) and type_.dtype is torch.float16 and value not in halves


def _wanted(node: fx.Node, value: fx.Node) -> torch.dtype | None:
    """The floating point type in which an operation reads a value; None if it does not read it."""
    name = name_of(node)
    if name in SHAPE_ONLY or name == "aten.to.dtype":
        return None
    if name == "tfqc.quantize_tokens.default":
        return torch.float16
    if stores(node):
        read_as = {argument for argument, given in operands(node).items() if given is value}
        return torch.float16 if read_as & _VALUES else torch.float32
    return torch.float32 if name.startswith(_WIDE) else torch.float16


def _cast(
    program: Program, reader: fx.Node, value: fx.Node, dtype: torch.dtype | None, casts: dict[Any, fx.Node]
) -> fx.Node:
    """The value in a floating point type; itself if it has that, or is no floating point tensor."""
    type_ = program.types[value.name]
    if dtype is None or not isinstance(type_, TensorType) or type_.dtype not in _FLOATS or type_.dtype is dtype:
        return value
    if value.op == "get_attr":
        if (value, dtype) not in casts:
            narrow = program.tensors[str(value.target)].to(dtype)
            casts[value, dtype] = program.tensor_node(program.add_tensor(f"{value.target}.f16", narrow))
        return casts[value, dtype]
    if (value, dtype) not in casts:
        short = "f16" if dtype is torch.float16 else "f32"
        before = reader if value.op == "placeholder" else value.next
        args = (value, dtype)
        casts[value, dtype] = program.insert(
            before, torch.ops.aten.to.dtype, args, name=f"{value.name}_{short}", like=value
        )
    return casts[value, dtype]
