"""Which tile a product's kernel has, from its shape and the chip alone: no compiler is asked.

A tile's cost is the greater of what the busiest multiprocessor has to do and what L2 has to move, in cycles. A block
that is alone on its multiprocessor also pays for what another one would cover: the barrier of each turn, copies that
come later than a turn takes, and, where it is not the last one, its first copies and its epilogue. It is the model of
`bench/gpu_model.py` without machine code; that prints how far the rule is off the best tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from tfqc.backends.cuda_int4.runtime.specialise import Epilogue, Gemm, Mode, Tile, body_for
from tfqc.errors import TfqcError

WIDE = Tile(128, 160, 64, 2, 32, 160)  # SDXL's widths are multiples of 160
DEEP = Tile(128, 160, 128, 2, 32, 160)  # the same with longer turns: for a block that is alone, and for 8-bit codes
SQUARE = Tile(128, 128, 64, 3, 64, 64)
TALL = Tile(224, 128, 128, 2, 112, 32)  # 100 of them are 2048 x 1280: one for each multiprocessor of an A100
NARROW = Tile(128, 64, 128)  # long turns, for products that are short of blocks
SMALL = Tile(64, 64)
TILES = (WIDE, DEEP, SQUARE, TALL, NARROW, SMALL)

_BARRIER = 100  # cycles of a turn in which a block alone multiplies nothing
_LATENCY = 700  # nanoseconds until a copy has come
_EPILOGUE = 1500  # cycles
_SHARED = 128  # bytes of shared memory a cycle


@dataclass(frozen=True)
class _Chip:
    """Multiprocessors, GHz; of one, KiB of shared memory and 8-bit products in a cycle; bytes of L2 in a cycle."""

    sms: int
    ghz: float
    shared: int
    products: int
    l2: int


# The cards that architectures stand for: A100, RTX 3090, RTX 4090, H100, RTX 5090.
_CHIPS = {
    "sm_80": _Chip(108, 1.41, 164, 2048, 3200),
    "sm_86": _Chip(82, 1.70, 100, 1024, 1350),
    "sm_89": _Chip(128, 2.52, 100, 1024, 1800),
    "sm_90a": _Chip(132, 1.83, 228, 2560, 3000),
    "sm_120a": _Chip(170, 2.41, 100, 1024, 2000),
}


def tile_for(n: int, k: int, m: int, mode: Mode, arch: str, paired: bool = False) -> Tile:
    """The tile of y [m, n] = a [m, k] w [n, k]^T with the least cost, of equal ones the smallest.

    paired: columns are values and gates of GEGLU.
    """
    body, end = body_for(arch, mode), Epilogue(activation="geglu" if paired else "none")
    costs: dict[Tile, float] = {}
    for tile in TILES:
        try:
            kernel = Gemm("tfqc_tile", n, 32, mode, body, end, tile=tile)
        except TfqcError:
            continue  # the tile does not suit it
        costs[tile] = _cost(kernel, k, m, _CHIPS[arch])
    return min(costs, key=lambda tile: (costs[tile], tile.m * tile.n))


def _cost(kernel: Gemm, k: int, m: int, chip: _Chip) -> float:
    tile, turns = kernel.tile, k / kernel.tile_k
    blocks = -(-m // tile.m) * -(-kernel.n // tile.n)
    rounds = -(-blocks // chip.sms)  # blocks of the busiest multiprocessor
    fit = min(kernel.blocks, chip.shared * 1024 // (kernel.shared_bytes + 1024))
    multiply = tile.m * tile.n * kernel.tile_k / chip.products / (2 if kernel.body == "s4" else 1)
    copies = kernel.shared_bytes // tile.stages
    reads = kernel.threads // 32 * (tile.warp_m * tile.row_bytes + tile.warp_n * kernel.tile_k // 2)
    latency = _LATENCY * chip.ghz
    alone = max(multiply + _BARRIER, latency / (tile.stages - 1))
    turn = max(rounds * max(multiply, (copies + reads) / _SHARED), -(-rounds // fit) * alone)
    waits = (rounds if fit == 1 else 1) * (latency + _EPILOGUE)
    moved = blocks * turns * copies + m * kernel.n * (1 if kernel.paired else 2)  # half of GEGLU's columns are written
    return max(turns * turn + waits, moved / chip.l2)
