"""The order in which CUDA kernels read 4-bit weights, and what goes with each of their columns.

Packed weights are u8 [N / 16, K / 64, 32, 16]: units of 16 columns by 64 inputs, in them 16 bytes for each lane of a
warp, two codes a byte. They are the registers b0, b1 of two 8-column blocks of the instruction, as the PTX manual gives
its fragments: lane 4 g + t holds column g of a block. With w4a16 they are [N / 32, K / 32, 32, 16], a register for each
of four blocks.

- w4a4, m16n8k64 of 4-bit codes: nibble i of register r is input 32 r + 8 t + i.
- w4a8, two m16n8k32 of 8-bit codes: byte j of register r of instruction h is input 32 h + 16 r + 4 t + j; its code
  is the low (h = 0) or the high nibble of the stored byte.
- w4a16, two m16n8k16 of f16: nibble 4 e + 2 h + r of a block's register is input 16 h + 8 r + 2 t + e, half e of
  register r of instruction h. Nibbles i and i + 4 then become the two halves of a register together.

Which column of the matrix is column g of block b of a warp's 32 is free. It is chosen so that a thread's sums are
neighbours in its row, and are stored at once: 8 (g / 2) + 2 b + g % 2. With GEGLU (`paired`), the 32 are 16 values and
their 16 gates, and a thread has 4 of each: 16 (b / 2) + 4 (g / 2) + 2 (b % 2) + g % 2.

Columns are padded to whole tiles with zeros (each half of paired ones), inputs to whole units.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["w4a4", "w4a8", "w4a16"]

_WARP_N = 32

# Factors of a unit's inputs: (register, t, byte, nibble), (instruction, register, t, byte), or (instruction, register,
# t, half); and which of them is t, and register, byte and nibble of a block's bytes, or half, instruction and register.
_INPUTS: dict[Mode, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "w4a4": ((2, 4, 4, 2), (1, 0, 2, 3)),
    "w4a8": ((2, 2, 4, 4), (2, 1, 3, 0)),
    "w4a16": ((2, 2, 4, 2), (2, 3, 0, 1)),
}
_BLOCKS: dict[Mode, int] = {"w4a4": 2, "w4a8": 2, "w4a16": 4}  # of 8 columns, in a unit


def pack(codes: Tensor, mode: Mode, tile_n: int = 128, paired: bool = False) -> Tensor:
    """Packed weights u8 [N / 16, K / 64, 32, 16], N and K padded, of codes int8 [N, K] in -8..7.

    With w4a16 [N / 32, K / 32, 32, 16].
    """
    sizes, order = _INPUTS[mode]
    inputs, within = math.prod(sizes), _BLOCKS[mode]
    ordered = F.pad(_padded_columns(codes, tile_n, paired, 0), (0, -codes.shape[1] % inputs))
    warps, units = len(ordered) // _WARP_N, ordered.shape[1] // inputs
    blocks = ordered.reshape(warps, _WARP_N, units, *sizes)[:, _block_columns(paired)]
    # warp, its unit, block, column g, unit of K, inputs -> warp, unit, unit of K, g, t, block, register, byte, nibble
    blocks = blocks.reshape(warps, 4 // within, within, 8, units, *sizes)
    t, register, byte, nibble = (5 + o for o in order)
    nibbles = blocks.permute(0, 1, 4, 3, t, 2, register, byte, nibble) & 15
    packed = nibbles[..., 0] | nibbles[..., 1] << 4
    return packed.to(torch.uint8).reshape(warps * 4 // within, units, 32, 16).contiguous()


def unpack(packed: Tensor, n: int, k: int, mode: Mode, paired: bool = False) -> Tensor:
    """Codes int8 [n, k]: the inverse of `pack`."""
    sizes, order = _INPUTS[mode]
    within, units = _BLOCKS[mode], packed.shape[1]
    warps = packed.shape[0] * within // 4
    nibbles = (torch.stack([packed & 15, packed >> 4], -1).to(torch.int8) ^ 8) - 8
    blocks = nibbles.reshape(warps, 4 // within, units, 8, 4, within, *(sizes[i] for i in order[1:]))
    places = dict(zip(order, (4, 6, 7, 8), strict=True))  # where each factor of K lies now
    columns = blocks.permute(0, 1, 5, 3, 2, *(places[i] for i in range(4)))
    ordered = torch.empty(warps, _WARP_N, units, *sizes, dtype=torch.int8)
    ordered[:, _block_columns(paired)] = columns.reshape(warps, _WARP_N, units, *sizes)
    return _own_columns(ordered.reshape(warps * _WARP_N, -1), n, paired)[:, :k].contiguous()


def columns(values: Tensor, tile_n: int = 128, paired: bool = False) -> Tensor:
    """Numbers for each column [.., N] (scales, biases, sums) as kernels read them: [.., N padded with zeros]."""
    return _padded_columns(values, tile_n, paired, values.dim() - 1).contiguous()


def weight_sums(codes: Tensor, tile_n: int = 128, paired: bool = False, group: int | None = None) -> Tensor:
    """Sum of each column's codes, int32 [N padded]: kernels take zero points off with them.

    With a group of so many inputs, each group's: [groups, N padded].
    """
    if group is not None:
        codes = F.pad(codes, (0, -codes.shape[1] % group)).unflatten(1, (-1, group)).transpose(0, 1)
    return columns(codes.sum(-1, dtype=torch.int32), tile_n, paired)


def pack_up(up: Tensor, tile_n: int = 128, paired: bool = False) -> Tensor:
    """The second factor of a branch of low rank, f16 [N / 32, rank / 16, 2, 32, 8], N padded, of f16 [N, rank].

    In the last two, lane 4 g + t has ranks 4 t .. 4 t + 3 of column g of two blocks, b0 and b1 of m16n8k16.
    """
    ordered = _padded_columns(up, tile_n, paired, 0)
    warps, steps = len(ordered) // _WARP_N, up.shape[1] // 16
    blocks = ordered.reshape(warps, _WARP_N, steps, 4, 4)[:, _block_columns(paired)]
    blocks = blocks.reshape(warps, 2, 2, 8, steps, 4, 4)  # warp, pair of blocks, block, column g, step, t, ranks
    return blocks.permute(0, 4, 1, 3, 5, 2, 6).reshape(warps, steps, 2, 32, 8).contiguous()


def pack_down(down: Tensor) -> Tensor:
    """The first factor of a branch of low rank, f16 [K / 32, rank / 8, 32, 8], K padded with zeros, of f16 [K, rank].

    Lane 4 g + t has inputs 8 t .. 8 t + 7 of column g, b0 and b1 of two m16n8k16.
    """
    padded = F.pad(down, (0, 0, 0, -down.shape[0] % 32))
    parts = padded.reshape(-1, 4, 8, down.shape[1] // 8, 8)  # 32 inputs, t, inputs, block, column g
    return parts.permute(0, 3, 4, 1, 2).reshape(len(parts), -1, 32, 8).contiguous()


def unpack_up(packed: Tensor, n: int, rank: int, paired: bool = False) -> Tensor:
    """f16 [n, rank]: the inverse of `pack_up`."""
    warps = len(packed)
    blocks = packed.reshape(warps, -1, 2, 8, 4, 2, 4).permute(0, 2, 5, 3, 1, 4, 6)
    ordered = torch.empty(warps, _WARP_N, rank, dtype=packed.dtype)
    ordered[:, _block_columns(paired)] = blocks.reshape(warps, _WARP_N, rank)
    return _own_columns(ordered.flatten(0, 1), n, paired)


def unpack_down(packed: Tensor, k: int, rank: int) -> Tensor:
    """f16 [k, rank]: the inverse of `pack_down`."""
    parts = packed.reshape(len(packed), -1, 8, 4, 8)  # 32 inputs, block, column g, t, inputs
    return parts.permute(0, 3, 4, 1, 2).reshape(-1, rank)[:k]


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


def _own_columns(ordered: Tensor, n: int, paired: bool) -> Tensor:
    """Rows [n, ...] of what has one for each padded column: the inverse of `_padded_columns`."""
    if not paired:
        return ordered[:n]
    halves = ordered.reshape(-1, 2, 16, ordered.shape[1]).transpose(0, 1).reshape(2, -1, ordered.shape[1])
    return halves[:, : n // 2].flatten(0, 1)


def _block_columns(paired: bool) -> Tensor:
    """Column of a warp's 32 that is column g of block b, at 8 b + g."""
    b, g = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
    mine = 16 * (b // 2) + 4 * (g // 2) + 2 * (b % 2) if paired else 8 * (g // 2) + 2 * b
    return (mine + g % 2).flatten()
