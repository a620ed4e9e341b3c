"""Rows of tables as integers."""

from __future__ import annotations

import torch
from torch import Tensor


def encode_row(row: Tensor, encoding: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a table row [1, ...] with one asymmetric scale: codes, scale [1], zero point [1] (i32).

    `int8` codes are -128..127, of the row's shape; `int4` codes are 0..15, packed two a byte, low nibble first.
    """
    top = 255 if encoding == "int8" else 15
    low, high = row.min().clamp(max=0), row.max().clamp(min=0)
    scale = ((high - low) / top).clamp(min=torch.finfo(torch.float32).tiny * 1e6)
    zero_point = torch.round(-low / scale)
    codes = torch.clamp(torch.round(row / scale) + zero_point, 0, top)
    if encoding == "int8":
        return (codes - 128).to(torch.int8), scale.reshape(1), (zero_point - 128).to(torch.int32).reshape(1)
    flat = codes.to(torch.uint8).flatten()
    flat = torch.cat([flat, flat.new_zeros(flat.numel() % 2)])
    return (flat[::2] | (flat[1::2] << 4))[None], scale.reshape(1), zero_point.to(torch.int32).reshape(1)
