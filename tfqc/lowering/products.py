"""Quantized linears and convolutions as products of codes: what passes that lower them share."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from tfqc.analysis.rewrite import become, name_of
from tfqc.ir.program import Program
from tfqc.runtime.packing import unpack_int4

ours = torch.ops.tfqc

Inputs = dict[fx.Node, tuple[Any, ...]]


def become_product(program: Program, node: fx.Node, inputs: Inputs, weights: dict[str, str]) -> None:
    """Let a linear or convolution multiply the codes of its input by those of its weight.

    inputs: has the (codes, scale, zero point, row) of inputs, and is told those that are made here, once for all that
    read them. weights: likewise the names of tensors that are made of stored ones, by theirs.
    """
    read, weight = node.args[:2]
    assert isinstance(read, fx.Node) and isinstance(weight, fx.Node)
    if read not in inputs:
        inputs[read] = _tokens(program, read) if name_of(read) == "tfqc.quantize_dynamic.default" else read.args
    operands = (*inputs[read], _codes(program, weight, weights), _scale(program, weight, weights))
    bias = node.args[2] if len(node.args) > 2 else None
    ending = ("none", None, None, None, None, None, "f32")
    if name_of(node) == "aten.linear.default":
        become(program, node, ours.qlinear.default, (*operands, bias, *ending))
        return
    stride, padding, _, groups = (*node.args[3:], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:]) :])
    become(program, node, ours.qconv.default, (*operands, bias, stride[0], padding[0], groups, *ending))  # type: ignore[index]


def _tokens(program: Program, read: fx.Node) -> tuple[Any, ...]:
    x, bits = read.args
    found = program.insert(read, ours.quantize_tokens.default, (x,) if bits == 8 else (x, bits), like=read)
    return (*(program.insert(read, operator.getitem, (found, i), like=read) for i in range(3)), None)


def _codes(program: Program, weight: fx.Node, made: dict[str, str]) -> fx.Node:
    """The codes of a stored weight, one a byte."""
    stored = weight.args[0]
    assert isinstance(stored, fx.Node)
    if name_of(weight) == "tfqc.dequantize_weight.default":
        return stored
    name = str(stored.target)
    if name not in made:
        packed, shape = program.tensors[name], weight.args[4]
        meta = torch.empty(shape, dtype=torch.int8, device="meta")  # type: ignore[arg-type]
        codes = meta if packed.is_meta else unpack_int4(packed, shape)  # type: ignore[arg-type]
        made[name] = program.add_tensor(name.removesuffix("packed") + "codes", codes)
    return program.tensor_node(made[name])


def _scale(program: Program, weight: fx.Node, made: dict[str, str]) -> fx.Node:
    """The scales of a weight's channels, [N], or of their groups, [N, G]."""
    stored = weight.args[1]
    assert isinstance(stored, fx.Node)
    if program.tensors[str(stored.target)].shape[1] > 1:
        return stored
    name = str(stored.target)
    if name not in made:
        made[name] = program.add_tensor(f"{name}.flat", program.tensors[name].flatten())
    return program.tensor_node(made[name])
