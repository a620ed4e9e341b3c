"""Whether operands of a kernel are as long as it will read: kernels trust what they are told.

Programs that the compiler made fit. What is checked here, once when a step is recorded, is what keeps a damaged or
forged artifact from reading memory that is not its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.cpu_int8.runtime.tiles import Tiles
from tfqc.runtime.tiles import tiles_shape


def need(holds: bool, name: str, what: str) -> None:
    """Raise where an operand does not fit.

    Raises:
        ValueError: naming the operation.
    """
    if not holds:
        raise ValueError(f"The artifact does not fit together: in %{name} {what}. Compile the model again.")


def check_row(name: str, tensor: Tensor, width: int, batch: int, rows: int, *, table: bool, request: bool) -> None:
    """Parameters [C], [B or 1, ..., C], rows of a table [T, C], or of a request's table [T, B, ..., C]; f32."""
    need(tensor.dtype == torch.float32, name, f"a parameter is {tensor.dtype}")
    need(
        tensor.dim() > 0 and tensor.shape[-1] == width, name, f"a parameter of {width} numbers is {list(tensor.shape)}"
    )
    need(width == 1 or tensor.stride(-1) == 1, name, "a parameter does not lie densely")
    lead = list(tensor.shape[:-1])
    if table:
        need(len(lead) > 0 and lead.pop(0) >= rows, name, f"a table has fewer rows than the schedule's {rows}")
    if request or not table:
        need(not lead or lead.pop(0) in (1, batch), name, f"a parameter of {batch} images is {list(tensor.shape)}")
    need(math.prod(lead) == 1, name, f"a parameter has the shape {list(tensor.shape)}")


def check_quantizer(name: str, scale: Tensor, zero: Tensor, tokens: Sequence[int], rows: int) -> None:
    """Scale f32 and zero point i32: [1], rows [T], or one for each token."""
    need(scale.dtype == torch.float32 and zero.dtype == torch.int32, name, f"a scale is {scale.dtype}, {zero.dtype}")
    need(scale.shape == zero.shape and scale.dim() > 0, name, "a scale has no zero point")
    need(scale.is_contiguous() and zero.is_contiguous(), name, "scales do not lie densely")
    if scale.dim() > 1:
        need(scale.numel() == math.prod(tokens), name, f"scales {list(scale.shape)} are not one for each token")
    else:
        need(scale.shape[0] == 1 or scale.shape[0] >= rows, name, f"scales have fewer rows than the schedule's {rows}")


def check_weight(name: str, weight: Any, scale: Tensor, inputs: int) -> None:
    """Packed weights of `inputs` input channels, their scales and sums."""
    need(isinstance(weight, Tiles), name, "the weight is not packed")
    shape, groups = weight.shape, weight.groups
    need(
        len(shape) in (2, 4) and min(shape) > 0 and groups > 0 and shape[0] % groups == 0, name, f"a weight is {shape}"
    )
    need(shape[1] * groups == inputs, name, f"a weight for {shape[1] * groups} inputs gets {inputs}")
    size = math.prod(tiles_shape(shape, groups))
    need(weight.packed.dtype == torch.int8 and weight.packed.numel() == size, name, "a weight has not the size it says")
    need(weight.sums.dtype == torch.int32, name, f"sums of a weight are {weight.sums.dtype}")
    need(weight.sums.numel() == groups * -(-(shape[0] // groups) // 16) * 16, name, "a weight has other sums")
    need(scale.dtype == torch.float32 and scale.shape == shape[:1], name, f"scales of a weight are {list(scale.shape)}")
    need(not weight.paired or shape[0] % 32 == 0, name, "a weight with pairs has no whole blocks of them")


def check_values(name: str, *values: Tensor | None) -> None:
    """Values in a dtype that kernels read."""
    for value in values:
        if value is not None:
            need(value.dtype in (torch.float32, torch.bfloat16, torch.uint8), name, f"a value is {value.dtype}")
            need(value.numel() > 0, name, "a value is empty")
