"""Codes of 1 to 8 bits, packed: eight of them into as many bytes as a code has bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [n / 8, bits] of codes 0 .. 2^bits − 1: int64 [n], n a multiple of 8. The first code is the lowest bits."""
    words = (codes.view(-1, 8) << _shifts(bits, codes.device)).sum(-1)  # disjoint bits: a sum is an or
    return words.view(torch.uint8).view(-1, 8)[:, :bits].contiguous()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes that `pack` packed: int64 [n]."""
    words = F.pad(packed, (0, 8 - bits)).contiguous().view(torch.int64)
    return ((words >> _shifts(bits, packed.device)) & ((1 << bits) - 1)).view(-1)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return bits * torch.arange(8, device=device)
