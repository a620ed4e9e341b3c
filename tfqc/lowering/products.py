"""Quantized linears and convolutions as products of codes: what passes that lower them share."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.views import Conv, Dequantize, Linear, QuantizeDynamic, StoredInt4, StoredWeight
from tfqc.runtime.packing import unpack_int4

ours = torch.ops.tfqc


@dataclass(frozen=True)
class Codes:
    """An input of products: codes and how to read them. Without a scale `codes` are values as they are."""

    codes: fx.Node
    scale: fx.Node | None = None
    zero_point: fx.Node | None = None
    row: fx.Node | None = None


@dataclass
class Products:
    """Lets linears and convolutions multiply codes of their input by those of their weight.

    What is made of an input or of a stored weight is made once for all that read it: `inputs` are what a pass, or this
    class, made of inputs; `made` are tensors by the name of what they were made of.
    """

    edit: Rewriter
    inputs: dict[fx.Node, Codes] = field(default_factory=dict[fx.Node, Codes])
    made: dict[str, str] = field(default_factory=dict[str, str])

    def lower(self, layer: Linear | Conv) -> None:
        """Rewrite one, whose weight is stored codes."""
        stored = StoredWeight.of(layer.weight)
        assert stored is not None
        if layer.input not in self.inputs:
            self.inputs[layer.input] = self._codes_of(layer.input)
        x = self.inputs[layer.input]
        operands = {
            "codes": x.codes,
            "scale": x.scale,
            "zero_point": x.zero_point,
            "row_in": x.row,
            "weight": self._weight(stored),
            "weight_scale": self._scale(stored),
            "bias": layer.bias,
        }
        if isinstance(layer, Linear):
            self.edit.become(layer.node, ours.qlinear.default, **operands)
        else:
            window: dict[str, Any] = {
                "stride": layer.stride[0],
                "padding": layer.padding[0],
                "groups": layer.groups,
            }
            self.edit.become(layer.node, ours.qconv.default, **operands, **window)

    def _codes_of(self, read: fx.Node) -> Codes:
        if dynamic := QuantizeDynamic.of(read):
            found = self.edit.insert(read, ours.quantize_tokens.default, dynamic.x, dynamic.bits, like=read)
            codes, scale, zero = (self.edit.insert(read, operator.getitem, found, i, like=read) for i in range(3))
            return Codes(codes, scale, zero)
        known = Dequantize.of(read)
        assert known is not None
        return Codes(known.codes, known.scale, known.zero_point, known.row)

    def _weight(self, stored: StoredWeight) -> fx.Node:
        """The codes of a stored weight, one a byte."""
        int4 = StoredInt4.of(stored.node)
        if int4 is None:
            return stored.codes
        program, name = self.edit.program, str(int4.packed.target)
        if name not in self.made:
            packed = program.tensors[name]
            meta = torch.empty(int4.shape, dtype=torch.int8, device="meta")
            codes = meta if packed.is_meta else unpack_int4(packed, int4.shape)
            self.made[name] = program.add_tensor(name.removesuffix("packed") + "codes", codes)
        return program.tensor_node(self.made[name])

    def _scale(self, stored: StoredWeight) -> fx.Node:
        """The scales of a weight's channels, [N], or of their groups, [N, G]."""
        program, name = self.edit.program, str(stored.scale.target)
        if program.tensors[name].shape[1] > 1:
            return stored.scale
        if name not in self.made:
            self.made[name] = program.add_tensor(f"{name}.flat", program.tensors[name].flatten())
        return program.tensor_node(self.made[name])
