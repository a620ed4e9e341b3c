"""Chips, the machine code of kernels on them, and how fast it could be there: bounds, not measurements.

A product's time is the greatest of: the tensor pipe, issue slots (one instruction a cycle and scheduler), the integer
pipe (two cycles an instruction), shared memory (128 bytes a cycle), each over what the busiest multiprocessor is given;
and L2 and DRAM traffic over the card's bandwidth. Instructions are counted in the disassembly of the kernel: those of
the main loop by turns, all others once. The first tile, and what is outside of the main loop, are waited for once a
kernel; once a wave where one block alone fits on a multiprocessor. A block's own time is a bound too ("latency"): at a
barrier all of its warps multiply nothing, and a turn is not shorter than its copies are under way, through the ring.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gpu_layers import Product

from tfqc.backends.cuda_int4 import sass, tiles
from tfqc.backends.cuda_int4.runtime import build
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Mode, Tile, Window, body_for, source
from tfqc.errors import TfqcError

LAUNCH_US = 1.0  # of a kernel in a CUDA graph, assumed
LATENCY_US = 0.7  # from DRAM until the first tile has come, assumed
EXPOSED_CYCLES = 100  # in which a warp alone multiplies nothing, each turn: barrier, first ldmatrix; assumed
SHARED_BYTES_PER_CYCLE = 128
SECTOR = 32  # bytes of L2 that a store takes a turn of, however few it writes
INTEGER_CYCLES = 2  # of a scheduler's 16 lanes for a warp
RESERVED_SHARED = 1024  # of each block, the driver's

# Those of the compiler's rule, and others, which are better for a few small layers alone.
TILES = (*tiles.TILES, Tile(), Tile(n=64), Tile(row_bytes=128, warp_n=64), Tile(m=256, warp_n=64), Tile(m=256))
_FP16_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 64))  # what cuBLAS can choose from, assumed

_INTEGER = {"LOP3", "LOP", "SHF", "IADD3", "IADD", "LEA", "ISETP", "SEL", "PRMT", "VIADD", "IMNMX", "VIMNMX", "MOV"}
_WIDTH = re.compile(r"\.(32|64|128)\b")


@dataclass(frozen=True)
class Chip:
    """A card. Rates are dense, in 10^12 operations a second at boost clock; fp16 accumulates in f32.

    mma_share: of the int8 rate, what mma.sync reaches. l2, dram: GB/s; l2 is not in whitepapers. flash: of the fp16
    rate, what flash attention reaches, assumed. shared: KiB of a multiprocessor; a block may have one less.
    """

    name: str
    arch: str
    sms: int
    ghz: float
    fp16: float
    int8: float
    int4: float | None
    shared: int
    threads: int
    blocks: int
    l2_mib: int
    l2: float
    dram: float
    flash: float
    source: str
    mma_share: float = 1.0
    registers: int = 65536

    def macs(self, operands: str) -> float:
        """Multiplications of a multiprocessor's tensor cores in a cycle: those of s4 or of s8 instructions."""
        rate = self.int4 if operands == "s4" else self.int8 * self.mma_share
        if rate is None:
            raise ValueError(f"{self.name} has no 4-bit tensor cores")
        return rate * 1e3 / 2 / self.sms / self.ghz


_L2 = "L2 bandwidth assumed from public microbenchmarks, rounded"
CHIPS = {
    chip.arch: chip
    for chip in (
        Chip("A100", "sm_80", 108, 1.41, 312, 624, 1248, 164, 2048, 32, 40, 4500, 2039, 0.60,
             f"A100 whitepaper (SXM, 80 GB); {_L2}"),
        Chip("RTX 3090", "sm_86", 82, 1.695, 71, 284, 568, 100, 1536, 16, 6, 2300, 936, 0.75,
             f"GA102 whitepaper (fp16 with f32 accumulation at half rate); {_L2}"),
        Chip("RTX 4090", "sm_89", 128, 2.52, 165.2, 660.6, 1321.2, 100, 1536, 24, 72, 4500, 1008, 0.80,
             f"Ada whitepaper (fp16 with f32 accumulation at half rate); {_L2}"),
        Chip("H100", "sm_90a", 132, 1.83, 989.4, 1978.9, None, 228, 2048, 32, 50, 5500, 3352, 0.50,
             f"H100 whitepaper (SXM5); mma.sync at 0.63 of wgmma's rate, arXiv 2402.13499; {_L2}", 0.63),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """What a kernel takes, and its instructions by opcode in a turn of the main loop and outside of it."""

    registers: int
    spills: int
    stack: int
    loop: dict[str, int]
    outside: dict[str, int]
    loop_shared: int  # bytes that a warp moves to and from shared memory in a turn
    outside_shared: int

    @property
    def per_imma(self) -> float:
        """Instructions of the main loop for each IMMA; 0 where K is so short that there is no loop."""
        return sum(self.loop.values()) / max(1, self.loop.get("IMMA", 0))


@dataclass(frozen=True)
class Bound:
    """Modelled time of a kernel and of what it is the greatest."""

    us: float
    parts: dict[str, float]  # microseconds of each resource, without launch and waiting
    blocks: int
    resident: int  # blocks that fit on a multiprocessor
    waves: float
    tail: float  # part of the multiprocessors' time that is idle since blocks do not come out even
    bytes: int  # of DRAM

    @property
    def binds(self) -> str:
        """The resource; launch and waiting where they are longer than it."""
        most = max(self.parts, key=lambda part: self.parts[part])
        return "launch" if self.us > 2 * self.parts[most] else most


def codes(kernels: Sequence[Gemm], arch: str, work: Path) -> dict[str, Code]:
    """Machine code by kernel name; kept by a hash of its source. Raises build.BuildError where tools are missing."""
    folder = work / "code"
    folder.mkdir(parents=True, exist_ok=True)
    files = {k.name: folder / f"{_hash(source([replace(k, name='tfqc_kernel')]))}-{arch}.json" for k in kernels}
    missing = [kernel for kernel in kernels if not files[kernel.name].exists()]
    for begin in range(0, len(missing), 8):
        some = missing[begin : begin + 8]
        made = build.compile(source(some), arch)
        text = build.disassemble(made.image)
        if text is None:
            raise build.BuildError("There is no nvdisasm: put it on PATH, or `pip install nvidia-cuda-nvdisasm`.")
        found, resources = sass.listings(text), made.resources()
        for kernel in some:
            code = _code(found[kernel.name], resources[kernel.name])
            part = files[kernel.name].with_suffix(".part")
            part.write_text(json.dumps(asdict(code)))
            part.rename(files[kernel.name])
    return {name: Code(**json.loads(file.read_text())) for name, file in files.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _code(listing: sass.Listing, taken: build.Resources) -> Code:
    loop = Counter(listing.main_loop())
    outside = Counter(listing.lines)
    outside.subtract(loop)
    outside = +outside

    def kinds(lines: Counter[str]) -> dict[str, int]:
        found: Counter[str] = Counter()
        for line, times in lines.items():
            found[sass.opcode(line).partition(".")[0]] += times
        return {name: times for name, times in found.items() if name != "NOP"}  # which pads the end

    def shared(lines: Counter[str]) -> int:
        return sum(times * _shared_bytes(sass.opcode(line)) for line, times in lines.items())

    return Code(taken.registers, taken.spills, taken.stack, kinds(loop), kinds(outside), shared(loop), shared(outside))


def _shared_bytes(opcode: str) -> int:
    """Bytes of a warp's access to shared memory."""
    name = opcode.partition(".")[0]
    if name == "LDSM":
        return 128 * int(opcode.rsplit(".", 1)[1])
    if name not in ("LDS", "STS", "LDGSTS"):
        return 0
    width = _WIDTH.search(opcode)
    return 4 * int(width.group(1)) if width else 128


def kernel_for(product: Product, mode: Mode, arch: str, tile: Tile) -> Gemm | None:
    """The specialised kernel, None where the tile does not suit it."""
    end = product.epilogue
    if end.out == "u4" and mode == "w4a8":
        end = replace(end, out="u8")
    body = body_for(arch, mode)
    try:
        key = (product.n, product.padded_k, end, product.window, tile, mode, body)
        name = f"tfqc_{_hash(repr(key))}"
        return Gemm(name, product.n, product.padded_k, mode, body, end, product.window, tile)
    except TfqcError:
        return None


def resident(kernel: Gemm, code: Code, chip: Chip) -> int:
    """Blocks on a multiprocessor: by registers (in units of 256 a warp), threads, shared memory, and the limit."""
    warps = kernel.threads // 32
    registers = chip.registers // (-(-code.registers * 32 // 256) * 256 * warps)
    shared = chip.shared * 1024 // (kernel.shared_bytes + RESERVED_SHARED)
    return min(registers, shared, chip.threads // kernel.threads, chip.blocks)


def bound(product: Product, kernel: Gemm, code: Code, chip: Chip, even: bool = False) -> Bound | None:
    """The modelled time of an int4 kernel; None where a block does not fit.

    even: as if blocks could be cut to give multiprocessors the same work for nothing, which no Stream-K beats.
    """
    fits = resident(kernel, code, chip)
    if not fits:
        return None
    rows, columns, _ = kernel.grid(product.m)
    blocks, warps = columns * rows, kernel.threads // 32
    turns, steps, units = kernel.k // kernel.tile_k, kernel.tile_k // 64, -(-kernel.k // 64)
    s4 = kernel.body == "s4"
    cycles = 16 * 8 * (64 if s4 else 32) / (chip.macs("s4" if s4 else "s8") / 4)  # of an IMMA on its tensor core
    imma = kernel.multiplies * units / steps

    def total(which: set[str] | None) -> float:
        inside, outside = (
            sum(n for name, n in part.items() if which is None or name in which) for part in (code.loop, code.outside)
        )
        return warps / 4 * (inside * turns + outside)

    of_block = {
        "tensor": warps / 4 * imma * cycles,
        "issue": total(None),
        "integer": total(_INTEGER) * INTEGER_CYCLES,
        "shared": warps * (code.loop_shared * turns + code.outside_shared) / SHARED_BYTES_PER_CYCLE,
    }
    wave = fits * chip.sms
    most = blocks // wave * fits + -(-(blocks % wave) // chip.sms)  # blocks of the busiest multiprocessor
    most = blocks / chip.sms if even else most
    waves = -(-blocks // wave)
    parts = {name: most * used / chip.ghz / 1e3 for name, used in of_block.items()}
    # A block's own time, with no other one on its multiprocessor: a barrier holds all of its warps, and a turn's copies
    # were asked for stages - 1 turns before.
    busy = of_block["tensor"] / (units / steps) + EXPOSED_CYCLES
    turn = max(busy, LATENCY_US * 1e3 * chip.ghz / (kernel.tile.stages - 1))
    parts["latency"] = (most / fits if even else -(-most // fits)) * turn * units / steps / chip.ghz / 1e3
    on_chip = max(parts.values())
    after = sum(code.outside.values()) * warps / 4 / chip.ghz / 1e3  # its issue slots
    waiting = (LATENCY_US + after) * (waves if fits == 1 else 1)
    a, w, out, stored = _operands(product, kernel)
    stages = units / steps * kernel.shared_bytes / kernel.tile.stages
    parts["L2"] = (blocks * stages + stored) / chip.l2 / 1e3
    passes = -(-blocks // wave) if a > chip.l2_mib * 2**19 else 1  # rows that do not stay in half of L2
    moved = int(a * min(passes, columns) + w + out)
    parts["DRAM"] = moved / chip.dram / 1e3
    us = LAUNCH_US + max(max(parts["DRAM"], parts["L2"]), waiting + on_chip)
    return Bound(us, parts, blocks, fits, blocks / wave, 1 - blocks / (most * chip.sms), moved)


def _operands(product: Product, kernel: Gemm) -> tuple[int, int, int, int]:
    """Bytes of codes, of weights, and of what the epilogue reads and writes: in memory, and in whole sectors of L2."""
    window = product.window
    if window is None:
        codes = product.m * kernel.k
    else:
        codes = product.images * (window.height + 2) * (window.width + 2) * kernel.k // 9
    written = {"u4": 0.5, "u8": 1.0}.get(kernel.epilogue.out, 2.0)
    columns = 16 if kernel.paired else 32  # that a warp stores at once, of one row
    outputs, residual = product.m * product.out_n, 2 * product.epilogue.residual
    in_memory, in_sectors = outputs * (written + residual), outputs * (max(written, SECTOR / columns) + residual)
    return codes * kernel.a_bits // 8, kernel.padded_n * -(-kernel.k // 64) * 32, int(in_memory), int(in_sectors)


def fp16_bound(product: Product, chip: Chip) -> tuple[float, float, str]:
    """cuBLAS on the same product: modelled time with the tail of its best tile, that without tails, and what binds.

    It does bias, activation and residual too, which cost it nothing here, but writes both halves of GEGLU.
    """
    moved = 2 * (product.values + product.n * product.k + product.m * product.n * (1 + product.epilogue.residual))
    dram = moved / chip.dram / 1e3
    ideal = product.operations / chip.fp16 / 1e6

    def tiled(tile: tuple[int, int]) -> float:
        blocks = math.prod(-(-size // t) for size, t in zip((product.m, product.n), tile, strict=True))
        each = 2 * tile[0] * tile[1] * product.k / (chip.fp16 * 1e6 / chip.sms)
        return -(-blocks // chip.sms) * each

    tensor = min(map(tiled, _FP16_TILES))
    us = LAUNCH_US + max(dram, tensor + LATENCY_US)
    return us, LAUNCH_US + max(dram, ideal + LATENCY_US), "DRAM" if dram > tensor else "tensor"


def best(product: Product, mode: Mode, chip: Chip, work: Path) -> Gemm:
    """The kernel whose tile has the least bound, by the code of a kernel of its kind, which may not spill."""
    found: list[tuple[float, Gemm]] = []
    for tile in TILES:
        kernel, like = kernel_for(product, mode, chip.arch, tile), typical(product, mode, chip, tile)
        if kernel is not None and like is not None:
            code = codes([like], chip.arch, work)[like.name]
            modelled = bound(product, kernel, code, chip)
            found += [(modelled.us, kernel)] if modelled is not None and not code.spills else []
    return min(found, key=lambda item: item[0])[1]


def ruled(product: Product, mode: Mode, chip: Chip) -> Gemm:
    """The kernel that the compiler would emit."""
    paired = product.epilogue.activation == "geglu"
    tile = tiles.tile_for(product.n, product.padded_k, product.m, mode, chip.arch, paired)
    kernel = kernel_for(product, mode, chip.arch, tile)
    if kernel is None:
        raise build.BuildError(f"The rule gives {product.name} {tile}, which does not suit it.")
    return kernel


def typical(product: Product, mode: Mode, chip: Chip, tile: Tile) -> Gemm | None:
    """A kernel that stands for those of layers with the same epilogue, linear or 3 x 3, to choose tiles by."""
    window = Window(32, 32) if product.window else None
    like = replace(product, n=1280, k=9 * 1280 if window else 1280, window=window)
    return kernel_for(like, mode, chip.arch, tile)
