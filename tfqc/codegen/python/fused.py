"""Fusing quantize and dequantize into one operation, which torch runs in one sweep."""

from __future__ import annotations

from torch import fx

from tfqc.ir.views import Dequantize, Quantize


def is_fused_quantize(node: fx.Node) -> bool:
    """True for a quantize whose readers all dequantize it."""
    readers = [u for u in node.users if u.op == "call_function"]
    return Quantize.of(node) is not None and all(Dequantize.of(u) is not None for u in readers)


def is_fused_dequantize(node: fx.Node) -> bool:
    """True for a dequantize that a fused quantize feeds."""
    known = Dequantize.of(node)
    return known is not None and is_fused_quantize(known.codes)
