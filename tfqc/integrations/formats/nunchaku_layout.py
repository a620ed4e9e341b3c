"""How Nunchaku's kernels for 4-bit products want tensors to lie in memory: each warp's registers one after the other.

Rows of a weight are outputs. They lie in tiles of 128 rows, a row being at (a, b, c) with row = 16 a + 8 b + c of its
tile (a < 8, b < 2, c < 8). Source: the packers of deepcompressor and nunchaku (Apache-2.0), written anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # rows of a tile; columns come in pairs of 64


def packed_codes(codes: Tensor) -> Tensor:
    """Codes [O, I], -8..7, as int8 [O, I/2]: of each tile and 64 columns, 32 lanes with 8 columns of 2 x 2 places.

    A column is at (d, e, f) with column = 32 d + 8 e + f of its 64 (d < 2, e < 4, f < 8). In memory the order is tile,
    64 columns, a, c, e, b, d, f: eight codes f make 32 bits, the first in the lowest four.
    """
    rows, columns = codes.shape
    parts = codes.to(torch.int32).reshape(rows // TILE, 8, 2, 8, columns // 64, 2, 4, 8)
    parts = parts.permute(0, 4, 1, 3, 6, 2, 5, 7) & 0xF
    pairs = (parts[..., 0::2] | (parts[..., 1::2] << 4)).to(torch.uint8)
    return pairs.contiguous().view(torch.int8).reshape(rows, columns // 2)


def packed_rows(values: Tensor) -> Tensor:
    """Values for each row, [O, G], as [G, O]: of each tile the G values of 128 rows, in the order of lanes.

    With a row at (a, b, g, h), row = 16 a + 8 b + 2 g + h (g < 4, h < 2), the order is tile, G, a, g, b, h.
    """
    rows, count = values.shape
    parts = values.reshape(rows // TILE, 8, 2, 4, 2, count).permute(0, 5, 1, 3, 2, 4)
    return parts.contiguous().reshape(count, rows)


def packed_low_rank(matrix: Tensor, down: bool) -> Tensor:
    """One factor of a branch of low rank: `down` [r, I] as [I, r], or up [O, r] as [O, r].

    In blocks of 16 x 16, of a factor's rows (b, c), row = 8 b + c, and columns (d, e, f), column = 8 d + 2 e + f
    (e < 4, f < 2), the order within a block is c, e, b, d, f. Blocks go by I or O first, then by r.
    """
    blocks = matrix.reshape(matrix.shape[0] // 16, 2, 8, matrix.shape[1] // 16, 2, 4, 2)
    order = (3, 0, 2, 5, 1, 4, 6) if down else (0, 3, 2, 5, 1, 4, 6)
    wide, rank = (matrix.shape[1], matrix.shape[0]) if down else matrix.shape
    return blocks.permute(order).contiguous().reshape(wide, rank)
