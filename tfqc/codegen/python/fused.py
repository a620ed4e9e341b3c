"""Fusing quantize and dequantize into one operation, which torch runs in one sweep."""

from __future__ import annotations

from torch import fx

from tfqc.ir.ops import op_name


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
