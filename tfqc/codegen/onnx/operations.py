"""QuantizeLinear and DequantizeLinear on their way through torch.export, and how they are written in ONNX.

They stand for operations of a lowered program while it is exported. ONNX computes codes as round(x / s) + z where tfqc
computes round(x * (1 / s)) + z: in a few values that lie between two codes the two differ by one code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tfqc.codegen.onnx.extra import needed

_LIBRARY = torch.library.Library("tfqc_onnx", "DEF")
_LIBRARY.define("quantize(Tensor x, Tensor scale, Tensor zero_point) -> Tensor")
_LIBRARY.define("dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int axis, int block) -> Tensor")
OPSET = 21


def _quantized(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def _dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


# They are traced, never run.
_LIBRARY.impl("quantize", _quantized, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantized, "CompositeExplicitAutograd")


def instead() -> dict[Any, Callable[..., Any]]:
    """What is traced in place of operations of tfqc."""
    ours = torch.ops.tfqc
    return {
        ours.quantize.default: _quantize,
        ours.dequantize.default: _dequantize,
        ours.dequantize_weight.default: _dequantize_weight,
        ours.dequantize_weight_int4.default: _dequantize_int4,
    }


def translations() -> dict[Any, Callable[..., Any]]:
    """How the traced operations are written in ONNX: for torch.onnx.export's `custom_translation_table`."""
    op = needed("onnxscript").opset21

    # torch.onnx passes what is None as None, which is an operand that is left out.
    def quantize(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.QuantizeLinear(x, scale, zero_point)

    def dequantize(codes: Any, scale: Any, zero_point: Any, axis: int, block: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis, block_size=block)

    mine = torch.ops.tfqc_onnx
    return {mine.quantize.default: quantize, mine.dequantize.default: dequantize}


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None, qmin: int, qmax: int) -> Tensor:
    dtype = torch.int8 if qmin < 0 else torch.uint8
    return torch.ops.tfqc_onnx.quantize(x, _picked(scale, row), _picked(zero_point, row).to(dtype))


def _dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, row: Tensor | None) -> Tensor:
    zero = _picked(zero_point, row).to(codes.dtype)
    return torch.ops.tfqc_onnx.dequantize(codes, _picked(scale, row), zero, 1, 0)


def _dequantize_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, group: int) -> Tensor:
    mine, zero = torch.ops.tfqc_onnx, zero_point.to(torch.int8)
    if scale.shape[1] == 1:  # one for each output channel
        return mine.dequantize(codes, scale.flatten(), zero.flatten(), 0, 0)
    flat = codes.reshape(codes.shape[0], -1)
    return mine.dequantize(flat, scale, zero, 1, group).reshape(codes.shape)


def _dequantize_int4(packed: Tensor, scale: Tensor, zero_point: Tensor, group: int, shape: list[int]) -> Tensor:
    """Of codes as emit.py leaves them: a byte each, zero points zero."""
    mine = torch.ops.tfqc_onnx
    if scale.shape[1] == 1:
        return mine.dequantize(packed, scale.flatten(), None, 0, 0)
    return mine.dequantize(packed, scale, None, 1, group).reshape(shape)


def _picked(parameter: Tensor, row: Tensor | None) -> Tensor:
    """One number for the tensor: engines multiply integers of no others."""
    return (parameter if row is None or parameter.shape[0] == 1 else parameter.index_select(0, row)).reshape(())
