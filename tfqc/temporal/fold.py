"""The algebra of folding: an operation on a feature becomes a per-step constant of the operation before it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from tfqc.ir.ops import op_name
from tfqc.ir.program import Program

aten, ours = torch.ops.aten, torch.ops.tfqc


def fold_bias(program: Program, node: fx.Node, features: Collection[str]) -> list[fx.Node]:
    """conv(x, w, b) + e  ->  conv with bias rows b + e, where e [B, O, 1, 1] is a feature. Returns the new rows."""
    for conv, feature in _operands(node, "aten.add.Tensor"):
        if not (_only_read_by(conv, node) and _is(conv, "aten.conv2d.default") and feature.name in features):
            continue
        operands: tuple[Any, ...] = conv.args
        x, weight_node, *given = operands
        bias, stride, padding, dilation, groups = (*given, *(None, [1, 1], [0, 0], [1, 1], 1)[len(given) :])
        if conv.kwargs or not all(isinstance(v, list) for v in (stride, padding, dilation)):
            continue
        weight = program.tensor_type(weight_node)
        type_ = program.tensor_type(feature)
        if weight is None or type_ is None or type_.shape[1:] != (weight.shape[0], 1, 1):
            continue
        rows = program.insert(node, aten.reshape.default, (feature, [-1, weight.shape[0]]), like=feature)
        if bias is not None:
            rows = program.insert(node, aten.add.Tensor, (bias, rows), like=feature)
        conv.target = ours.conv2d_rows.default
        conv.args = (x, weight_node, rows, stride, padding, dilation, groups)
        node.prepend(conv)  # the rows are made between the convolution's old place and here
        program.replace(node, conv)
        return [rows]
    return []


def fold_affine(program: Program, node: fx.Node, features: Collection[str]) -> list[fx.Node]:
    """norm(x) * m + a  ->  norm with affine rows γ·m and β·m + a, where m and a are features. Returns the new rows."""
    for product, shift in _operands(node, "aten.add.Tensor"):
        if not (_only_read_by(product, node) and shift.name in features):
            continue
        for norm, scale in _operands(product, "aten.mul.Tensor"):
            if _only_read_by(norm, product) and scale.name in features:
                made = _norm_rows(program, norm, product, node, scale, shift)
                if made:
                    return made
    return []


def _norm_rows(
    program: Program, norm: fx.Node, product: fx.Node, node: fx.Node, scale: fx.Node, shift: fx.Node
) -> list[fx.Node]:
    type_ = program.tensor_type(norm)
    if type_ is None or norm.kwargs:
        return []
    if _is(norm, "aten.group_norm.default"):
        channels, spread = type_.shape[1], (1,) * (len(type_.shape) - 2)
        given: tuple[Any, ...] = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])
        x, groups, weight, bias, eps = given[:5]
        target, head = ours.group_norm_rows.default, (x, groups)
        expected = (channels, *spread)
    elif _is(norm, "aten.layer_norm.default") and len(type_.shape) == 3:
        given = (*norm.args, *(None, None, 1e-5)[len(norm.args) - 2 :])
        x, shape, weight, bias, eps = given[:5]
        channels = type_.shape[2]
        if list(shape) != [channels]:
            return []
        target, head = ours.layer_norm_rows.default, (x, shape)
        expected = (1, channels)
    else:
        return []
    for feature in (scale, shift):
        found = program.tensor_type(feature)
        if found is None or found.shape[1:] != expected:
            return []

    def insert(op: Any, *args: Any) -> fx.Node:
        return program.insert(node, op, args, like=scale)

    gain = insert(aten.reshape.default, scale, [-1, channels])
    offset = insert(aten.reshape.default, shift, [-1, channels])
    if bias is not None:
        offset = insert(aten.add.Tensor, insert(aten.mul.Tensor, bias, gain), offset)
    if weight is not None:
        gain = insert(aten.mul.Tensor, weight, gain)
    norm.target, norm.args, norm.kwargs = target, (*head, gain, offset, eps), {}
    node.prepend(norm)
    program.replace(node, norm)
    program.step.erase_node(product)
    return [gain, offset]


def _operands(node: fx.Node, name: str) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the two operands of a commutative operation called `name`; nothing for any other node."""
    if not _is(node, name) or node.kwargs or len(node.args) != 2:
        return []
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return []
    return [(first, second), (second, first)]


def _is(node: fx.Node, name: str) -> bool:
    return node.op == "call_function" and op_name(node.target) == name


def _only_read_by(value: fx.Node, reader: fx.Node) -> bool:
    return list(value.users) == [reader]
