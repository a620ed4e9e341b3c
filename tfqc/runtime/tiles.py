"""The order in which CPU kernels read int8 weights: tiles of 16 outputs by 64 inputs.

A product of [.., K] with [N, K] has tiles [ceil(N / 16), ceil(K / 64), 16, 16, 4]: blocks of 16 outputs, in them blocks
of 64 inputs, in them 16 groups of 4 inputs for each of the 16 outputs, which is what the int8 dot product
instructions of AVX-512 and AMX take as they lie. What is beyond N or K is 0. `paired` (GEGLU) puts the blocks of the
first half of the outputs, the values, in turn with those of the second half, the gates.

A convolution [N, C, kh, kw] is a product whose K runs over (kh, kw, C), the channels of each tap padded to a multiple
of 64; where there are fewer than 64, those of all taps of a kernel's row together. A leading dimension is its groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def tiles_shape(shape: Sequence[int], groups: int = 1) -> tuple[int, ...]:
    """Shape of the tiles of a weight [N, K] or [N, C, kh, kw]."""
    n, k = shape[0] // groups, shape[1]
    if len(shape) == 4:
        run = _run(shape)
        k = math.prod(shape[1:]) // run * (run + -run % 64)
    tiles = (-(-n // 16), -(-k // 64), 16, 16, 4)
    return tiles if len(shape) == 2 else (groups, *tiles)


def pack(codes: Tensor, groups: int = 1, paired: bool = False) -> Tensor:
    """Tiles of int8 codes [N, K] or [N, C, kh, kw]."""
    if codes.dim() == 4:
        runs = codes.permute(0, 2, 3, 1).reshape(len(codes), -1, _run(codes.shape))
        wide = F.pad(runs, (0, -runs.shape[2] % 64)).reshape(groups, len(codes) // groups, -1)
        return torch.stack([pack(group) for group in wide])
    n, k = codes.shape
    if paired:
        codes = codes[_pairs(n)]
    blocks = F.pad(codes, (0, -k % 64, 0, -n % 16)).reshape(-(-n // 16), 16, -(-k // 64), 16, 4)
    return blocks.permute(0, 2, 3, 1, 4).contiguous()


def unpack(tiles: Tensor, shape: Sequence[int], groups: int, paired: bool, bits: int) -> Tensor:
    """Inverse of `pack`; with bits = 4 from flat u8 that holds two codes a byte, as `tfqc.runtime.packing` has it."""
    if bits == 4:
        nibbles = torch.stack([tiles & 15, tiles >> 4], dim=-1).flatten().to(torch.int8)
        full = tiles_shape(shape, groups)
        tiles = ((nibbles[: math.prod(full)] ^ 8) - 8).reshape(full)
    if len(shape) == 4:
        n, c, kh, kw = shape
        run, width = _run(shape), tiles.shape[2] * 64
        wide = torch.cat([unpack(group, (n // groups, width), 1, False, 8) for group in tiles])
        runs = wide.reshape(n, c * kh * kw // run, -1)[..., :run]
        return runs.reshape(n, kh, kw, c).permute(0, 3, 1, 2).contiguous()
    n, k = shape
    codes = tiles.permute(0, 3, 1, 2, 4).reshape(tiles.shape[0] * 16, -1)[:n, :k]
    if paired:
        codes = codes[torch.argsort(_pairs(n))]
    return codes.contiguous()


def columns(values: Tensor, groups: int = 1, paired: bool = False) -> Tensor:
    """Numbers for each output [..., N], in the order of the tiles, each group padded with zeros to a multiple of 16."""
    if paired:
        values = values[..., _pairs(values.shape[-1])]
    each = values.reshape(*values.shape[:-1], groups, -1)
    return F.pad(each, (0, -each.shape[-1] % 16)).flatten(-2).contiguous()


def sums(codes: Tensor, groups: int = 1, paired: bool = False) -> Tensor:
    """Sum of each output's codes, i32, in the order of the tiles."""
    return columns(codes.flatten(1).sum(1, dtype=torch.int32), groups, paired)


def _run(shape: Sequence[int]) -> int:
    """How many inputs of a convolution follow each other without padding."""
    return shape[1] * shape[3] if shape[1] < 64 else shape[1]


def _pairs(n: int) -> Tensor:
    """Outputs in the order of GEGLU: 16 values, their 16 gates, the next 16 values, ..."""
    return torch.arange(n).reshape(2, -1, 16).transpose(0, 1).flatten()
