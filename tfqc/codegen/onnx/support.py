"""Which operations of a lowered program have their like in ONNX."""

from __future__ import annotations

import math

from torch import fx

from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType
from tfqc.ir.views import Quantize, StoredWeight


def why_not(program: Program, node: fx.Node, target: str) -> str:
    """Why an operation is not written for a target; empty if it is."""
    if (quantize := Quantize.of(node)) and (quantize.qmin, quantize.qmax) not in ((0, 255), (-128, 127)):
        return f"QuantizeLinear rounds to all of 8 bits: take {target}{{activations=8}} or {target}{{activations=none}}"
    if stored := StoredWeight.of(node):
        type_, groups = program.type(node), program.type(stored.scale)
        assert isinstance(type_, TensorType) and isinstance(groups, TensorType)
        width = math.prod(int(dim) for dim in type_.shape[1:])
        if groups.shape[1] != 1 and width % stored.group:
            return f"blocks of DequantizeLinear divide a row of {width}, and groups of {stored.group} do not"
    name = op_name(node.target)
    return "" if name.startswith(("aten.", "tfqc.", "operator.", "math.", "torch.")) else f"{name} is no ATen operation"
