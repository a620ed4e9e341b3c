"""A model in half precision, computed in f32: stored weights stay as they are, and are cast where they are read.

Quantizers, tables and kernels then know one floating point type, and no model is in memory a second time: a weight is
f32 while one operation reads it. What is small (biases, parameters of norms) is kept as f32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tfqc.errors import PassError
from tfqc.frontend.functional import CASTS
from tfqc.ir.edit import Rewriter
from tfqc.ir.infer import infer_type
from tfqc.ir.match import is_call, is_stored
from tfqc.ir.program import Program
from tfqc.ir.types import HALVES, TensorType, Type
from tfqc.ir.views import Cast

aten = torch.ops.aten
_LOOKUPS = (aten.embedding.default,)  # of a few rows: those are cast, not the table


def has_half_weights(program: Program) -> bool:
    """True if the program holds a tensor in f16 or bf16."""
    return any(tensor.dtype in HALVES for tensor in program.tensors.values())


def widen(program: Program) -> None:
    """Let @step, and its inputs, be f32 where they are f16 or bf16; for captured programs in canonical form.

    Raises:
        PassError: it reads the bits of such numbers as something else.
    """
    edit, types = Rewriter(program), dict(program.types)
    program.inputs = tuple(replace(i, type=replace(i.type, dtype=_wide(i.type.dtype))) for i in program.inputs)
    program.types |= {i.name: i.type for i in program.inputs}
    for name, tensor in program.tensors.items():
        if tensor.dtype in HALVES and tensor.dim() < 2:
            program.tensors[name] = tensor.float()
    for node in program.nodes():
        if is_stored(node):
            tensor = program.tensors[str(node.target)]
            program.types[node.name] = TensorType(tensor.dtype, tuple(tensor.shape))
        elif is_call(node):
            _widen(edit, node, types)


def _widen(edit: Rewriter, node: fx.Node, types: Mapping[str, Type]) -> None:
    """One operation, behind those that it reads."""
    program = edit.program
    operands: dict[str, Any] = {k: _wide(v) if isinstance(v, torch.dtype) else v for k, v in node.kwargs.items()}
    if is_call(node, aten.view.dtype) and _is_half(types[node.all_input_nodes[0].name]):
        raise PassError(f"{program.at(node)} reads the bits of numbers in half precision: convert the model to f32.")
    node.kwargs = operands
    if not is_call(node, *_LOOKUPS) and Cast.of(node) is None:
        for value in node.all_input_nodes:
            if is_stored(value) and _is_half(program.types[value.name]):
                node.replace_input_with(value, _cast(edit, node, value))
    program.types[node.name] = infer_type(program, node)
    if is_call(node, *CASTS):
        value = node.all_input_nodes[0].name
        same = program.types[node.name] == program.types[value]
        # What works in place behind it still does not change its operand; one that is not in `types` is a cast of ours.
        if same and types[node.name] != types.get(value):
            node.update_kwarg("copy", True)
    readers = [user for user in node.users if Cast.of(user) is None]
    if is_call(node, *_LOOKUPS) and _is_half(program.types[node.name]) and readers:
        cast = _cast(edit, node.next, node)
        for reader in readers:  # they are typed in their turn
            reader.replace_input_with(node, cast)


def _cast(edit: Rewriter, before: fx.Node, value: fx.Node) -> fx.Node:
    return edit.insert(before, aten.to.dtype, value, torch.float32, name=f"{value.name}_f32", like=before)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _dtype(type_: Type) -> torch.dtype | None:
    return type_.dtype if isinstance(type_, TensorType) else None


def _is_half(type_: Type) -> bool:
    return _dtype(type_) in HALVES
