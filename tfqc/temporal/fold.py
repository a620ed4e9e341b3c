"""The algebra of folding: an operation on a feature becomes a per-step constant of the operation before it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import Call, call, capture, match
from tfqc.ir.views import Conv, GroupNorm, LayerNorm

aten, ours = torch.ops.aten, torch.ops.tfqc

_BIAS = call(
    aten.add.Tensor, self=call(aten.conv2d.default, name="conv", once=True), other=capture("feature"), commutes=True
)
_PRODUCT = call(
    aten.mul.Tensor,
    self=call(aten.group_norm.default, aten.layer_norm.default, name="norm", once=True),
    other=capture("scale"),
    name="product",
    once=True,
    commutes=True,
)
_AFFINE = call(aten.add.Tensor, self=_PRODUCT, other=capture("shift"), commutes=True)


def fold_bias(edit: Rewriter, node: fx.Node, features: Collection[str]) -> list[fx.Node]:
    """conv(x, w, b) + e  ->  conv with bias rows b + e, where e [B, O, 1, 1] is a feature. Returns the new rows."""
    for found in _matches(_BIAS, node, ("feature",), features):
        conv, feature = Conv(found["conv"]), found["feature"]
        weight, type_ = edit.program.tensor_type(conv.weight), edit.program.tensor_type(feature)
        if weight is None or type_ is None or type_.shape[1:] != (weight.shape[0], 1, 1):
            continue
        rows = edit.insert(node, aten.reshape.default, feature, [-1, weight.shape[0]], like=feature)
        if conv.bias is not None:
            rows = edit.insert(node, aten.add.Tensor, conv.bias, rows, like=feature)
        node.prepend(conv.node)  # the rows are made between the convolution's old place and here
        edit.become(conv.node, ours.conv2d_rows.default, **{**conv.node.kwargs, "bias": rows})
        edit.program.replace(node, conv.node)
        return [rows]
    return []


def fold_affine(edit: Rewriter, node: fx.Node, features: Collection[str]) -> list[fx.Node]:
    """norm(x) * m + a  ->  norm with affine rows γ·m and β·m + a, where m and a are features. Returns the new rows."""
    for found in _matches(_AFFINE, node, ("scale", "shift"), features):
        if made := _norm_rows(edit, node, **found):
            return made
    return []


def _matches(pattern: Call, node: fx.Node, names: tuple[str, ...], features: Collection[str]) -> list[dict[str, Any]]:
    """Ways in which a sum, without a factor, matches with features at all of `names`."""
    if node.kwargs.get("alpha") != 1:
        return []
    return [
        found
        for found in match(pattern, node)
        if all(isinstance(found[n], fx.Node) and found[n].name in features for n in names)
    ]


def _norm_rows(
    edit: Rewriter, node: fx.Node, norm: fx.Node, product: fx.Node, scale: fx.Node, shift: fx.Node
) -> list[fx.Node]:
    program = edit.program
    type_ = program.tensor_type(norm)
    if type_ is None:
        return []
    if its := GroupNorm.of(norm):
        channels, expected = type_.shape[1], (type_.shape[1], *(1,) * (len(type_.shape) - 2))
        target, kept = ours.group_norm_rows.default, {"groups": its.groups}
    else:
        its = LayerNorm(norm)
        channels, expected = type_.shape[-1], (1, type_.shape[-1])
        if len(type_.shape) != 3 or list(its.shape) != [channels]:
            return []
        target, kept = ours.layer_norm_rows.default, {"shape": list(its.shape)}
    for feature in (scale, shift):
        found = program.tensor_type(feature)
        if found is None or found.shape[1:] != expected:
            return []

    def insert(op: Any, *args: Any) -> fx.Node:
        return edit.insert(node, op, *args, like=scale)

    gain = insert(aten.reshape.default, scale, [-1, channels])
    offset = insert(aten.reshape.default, shift, [-1, channels])
    if its.bias is not None:
        offset = insert(aten.add.Tensor, insert(aten.mul.Tensor, its.bias, gain), offset)
    if its.weight is not None:
        gain = insert(aten.mul.Tensor, its.weight, gain)
    node.prepend(norm)
    edit.become(norm, target, input=its.input, weight=gain, bias=offset, eps=its.eps, **kept)
    program.replace(node, norm)
    program.step.erase_node(product)
    return [gain, offset]
