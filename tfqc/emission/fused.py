"""Fusing quantize and dequantize into one operation, which torch runs in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tfqc.ir.ops import op_name


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """dequantize(quantize(x)), bit for bit: clamping the centred grid saves adding z and taking it away.

    Four sweeps of plain arithmetic take about half the time of torch.fake_quantize_per_tensor_affine on a CPU.
    """
    s, z = (scale, zero_point) if row is None else (scale[row], zero_point[row])
    shape = () if s.numel() == 1 else (-1, *[1] * (x.dim() - 1))
    s, z = s.reshape(shape), z.reshape(shape).to(torch.float32)
    return (x * (1.0 / s)).round_().clamp_(qmin - z, qmax - z).mul_(s)


def is_fused_quantize(node: fx.Node) -> bool:
    """True for a quantize whose readers all dequantize it."""
    return (
        node.op == "call_function"
        and op_name(node.target) == "tfqc.quantize.default"
        and all(op_name(u.target) == "tfqc.dequantize.default" for u in node.users if u.op == "call_function")
    )


def is_fused_dequantize(node: fx.Node) -> bool:
    """True for a dequantize that a fused quantize feeds."""
    return (
        node.op == "call_function"
        and op_name(node.target) == "tfqc.dequantize.default"
        and isinstance(node.args[0], fx.Node)
        and is_fused_quantize(node.args[0])
    )
