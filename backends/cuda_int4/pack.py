"""The order in which CUDA kernels read 4-bit weights, and what goes with each of their columns.

Packed weights are u8 [N / 16, K / 64, 32, 16]: units of 16 columns by 64 inputs, in them 16 bytes for each lane of a
warp, two codes a byte. They are the registers b0, b1 of two 8-column blocks of the instruction, as the PTX manual gives
its fragments: lane 4 g + t holds column g of a block.

- w4a4, m16n8k64 of 4-bit codes: nibble i of register r is input 32 r + 8 t + i.
- w4a8, two m16n8k32 of 8-bit codes: byte j of register r of instruction h is input 32 h + 16 r + 4 t + j; its code
  is the low (h = 0) or the high nibble of the stored byte.

Which column of the matrix is column g of block b of a warp's 32 is free. It is chosen so that a thread's sums are
neighbours in its row, and are stored at once: 8 (g / 2) + 2 b + g % 2. With GEGLU (`paired`), the 32 are 16 values and
their 16 gates, and a thread has 4 of each: 16 (b / 2) + 4 (g / 2) + 2 (b % 2) + g % 2.

Columns are padded to whole tiles with zeros (each half of paired ones), inputs to 64.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["w4a4", "w4a8"]

_UNIT_N, _UNIT_K, _WARP_N = 16, 64, 32

# Factors of 64 inputs: (register, t, byte, nibble), or (instruction, register, t, byte); and which of them is
# t, register, byte and nibble.
_INPUTS: dict[Mode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "w4a4": ((2, 4, 4, 2), (1, 0, 2, 3)),
    "w4a8": ((2, 2, 4, 4), (2, 1, 3, 0)),
}


def pack(codes: Tensor, mode: Mode, tile_n: int = 128, paired: bool = False) -> Tensor:
    """Packed weights u8 [N / 16, K / 64, 32, 16], N and K padded, of codes int8 [N, K] in -8..7."""
    ordered = F.pad(_padded_columns(codes, tile_n, paired, 0), (0, -codes.shape[1] % _UNIT_K))
    sizes, order = _INPUTS[mode]
    warps, units = len(ordered) // _WARP_N, ordered.shape[1] // _UNIT_K
    blocks = ordered.reshape(warps, _WARP_N, units, *sizes)[:, _block_columns(paired)]
    # warp, pair of blocks, block, column g, unit, inputs -> warp, pair, unit, g, t, block, register, byte, nibble
    blocks = blocks.reshape(warps, 2, 2, 8, units, *sizes)
    t, register, byte, nibble = (5 + o for o in order)
    nibbles = blocks.permute(0, 1, 4, 3, t, 2, register, byte, nibble) & 15
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    return packed.to(torch.uint8).reshape(warps * 2, units, 32, 16).contiguous()


def unpack(packed: Tensor, n: int, k: int, mode: Mode, paired: bool = False) -> Tensor:
    """Codes int8 [n, k]: the inverse of `pack`."""
    sizes, order = _INPUTS[mode]
    warps, units = packed.shape[0] // 2, packed.shape[1]
    nibbles = (torch.stack([packed & 15, packed >> 4], -1).to(torch.int8) ^ 8) - 8
    blocks = nibbles.reshape(warps, 2, units, 8, 4, 2, 2, 4, 2)
    places = dict(zip(order, (4, 6, 7, 8), strict=True))  # where each factor of K lies now
    columns = blocks.permute(0, 1, 5, 3, 2, *(places[i] for i in range(4)))
    ordered = torch.empty(warps, _WARP_N, units, *sizes, dtype=torch.int8)
    ordered[:, _block_columns(paired)] = columns.reshape(warps, _WARP_N, units, *sizes)
    flat = ordered.reshape(warps * _WARP_N, units * _UNIT_K)
    if paired:
        flat = flat.reshape(-1, 2, 16, flat.shape[1]).transpose(0, 1).reshape(2, -1, flat.shape[1])
        flat = flat[:, : n // 2].flatten(0, 1)
    return flat[:n, :k].contiguous()


def columns(values: Tensor, tile_n: int = 128, paired: bool = False) -> Tensor:
    """Numbers for each column [.., N] (scales, biases, sums) as kernels read them: [.., N padded with zeros]."""
    return _padded_columns(values, tile_n, paired, values.dim() - 1).contiguous()


def weight_sums(codes: Tensor, tile_n: int = 128, paired: bool = False) -> Tensor:
    """Sum of each column's codes, int32 [N padded]: kernels take zero points off with them."""
    return columns(codes.sum(1, dtype=torch.int32), tile_n, paired)


def window_codes(codes: Tensor) -> Tensor:
    """Weight codes [N, C, kh, kw] as those of a product: [N, kh * kw * C], the channels of each tap padded to 32."""
    taps = codes.permute(0, 2, 3, 1)
    return F.pad(taps, (0, -codes.shape[1] % 32)).flatten(1)


def _padded_columns(values: Tensor, tile_n: int, paired: bool, dim: int) -> Tensor:
    """`values` with N along `dim` padded to tiles; of paired ones 16 values, their 16 gates, the next 16, ..."""
    last = values.movedim(dim, -1)
    padded = -(-last.shape[-1] // tile_n) * tile_n
    if paired:
        halves = last.unflatten(-1, (2, -1))
        halves = F.pad(halves, (0, padded // 2 - halves.shape[-1])).unflatten(-1, (-1, 16))
        last = halves.transpose(-3, -2).flatten(-3)
    else:
        last = F.pad(last, (0, padded - last.shape[-1]))
    return last.movedim(-1, dim)


def _block_columns(paired: bool) -> Tensor:
    """Column of a warp's 32 that is column g of block b, at 8 b + g."""
    b, g = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
    mine = 16 * (b // 2) + 4 * (g // 2) + 2 * (b % 2) if paired else 8 * (g // 2) + 2 * b
    return (mine + g % 2).flatten()
