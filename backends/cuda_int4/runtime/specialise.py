"""Kernels specialised to a program's shapes: what a kernel is asked to be, and the .cu text of a list of them.

The templates lie in `kernels/`; what is written for a kernel is its constants and an entry with a C name. One kind of
kernel takes the same `arguments` whatever its constants: pointers, then a number of rows; what it does not need may be
null (`epilogue.cuh` says what each is).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tfqc.errors import TfqcError
from tfqc.runtime.sources import joined

Mode = Literal["w4a4", "w4a8", "w4a16"]
Body = Literal["s4", "nibble", "half", "auto"]
Rows = Literal["one", "step", "token"]

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a")
_NATIVE_S4 = {
    "sm_80",
    "sm_86",
    "sm_87",
    "sm_88",
    "sm_89",
}  # later ones emulate them with some 180 instructions
_A_BITS: dict[Mode, int] = {"w4a4": 4, "w4a8": 8, "w4a16": 16}
_NAME = re.compile(r"tfqc_[A-Za-z0-9_]+")  # which is unlike every name in the templates
_RANKS = "a rank has to be a multiple of 16, at most 128"
_MISNAMED = "its name has to be tfqc_ and letters of C's names"


def body_for(arch: str, mode: Mode) -> Body:
    """How products are computed on a chip: codes by 4-bit instructions where it has them, else by 8-bit ones."""
    if mode == "w4a16":
        return "half"
    return "s4" if mode == "w4a4" and arch in _NATIVE_S4 else "nibble"


def _is_rank(rank: int) -> bool:
    return rank % 16 == 0 and 0 <= rank <= 128


@dataclass(frozen=True)
class Tile:
    """What a block computes at once: m by n outputs, `row_bytes` of each row of a, in a ring of `stages` tiles.

    A warp computes warp_m by warp_n of them, strips of 32 columns one after the other with the same rows of a.
    """

    m: int = 128
    n: int = 128
    row_bytes: int = 64
    stages: int = 3
    warp_m: int = 64
    warp_n: int = 32

    @property
    def large(self) -> bool:
        """Whether a warp has more sums than 128 registers a thread hold."""
        return self.warp_m * self.warp_n > 64 * 32


@dataclass(frozen=True)
class Window:
    """The input of a 3 x 3 convolution with a border of one pixel around it."""

    height: int
    width: int
    stride: int = 1

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the convolution's output."""
        return (self.height - 1) // self.stride + 1, (self.width - 1) // self.stride + 1


@dataclass(frozen=True)
class Epilogue:
    """What becomes of a product's sums; `epilogue.cuh` states the order and the rounding.

    scales: of the input's codes, with their zero points. bias: one row or the step's. out: f16, codes for the next
    layer, or the sums. out_scales: of the codes that are written. rank: of the branch low [M, rank] . up [n, rank] in
    f16 that is added to the product.
    """

    scales: Rows = "step"
    bias: Literal["none", "one", "step"] = "none"
    activation: Literal["none", "silu", "gelu", "gelu_tanh", "geglu"] = "none"
    residual: bool = False
    out: Literal["f16", "u4", "u8", "s32"] = "f16"
    out_scales: Literal["one", "step"] = "step"
    rank: int = 0


@dataclass(frozen=True)
class Gemm:
    """y [M, n] = epilogue(a [M, k] w [n, k]^T): 4- or 8-bit codes or f16 a, 4-bit codes w; M is an argument.

    k: codes in a row of a, a multiple of 32. With a `window`, 9 times the channels of a pixel, which are padded to 32.
    body: "auto" leaves it to the compiler, so that one text serves several chips; only for w4a4, as others have one.
    group: inputs that share a scale of weights, of which each column then has [ceil(k / group)]; none: all of them.
    """

    name: str
    n: int
    k: int
    mode: Mode
    body: Body
    epilogue: Epilogue = Epilogue()
    window: Window | None = None
    tile: Tile = Tile()
    group: Literal[128] | None = None

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise TfqcError(f"kernel {self.name}: {problem}")

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments in order."""
        return (
            "a", "weight", "weight_sum", "weight_scale", "bias", "scale", "zero", "step", "residual", "low", "up",
            "out_inverse", "out_zero", "out", "m",
        )  # fmt: skip

    @property
    def a_bits(self) -> int:
        """Bits of a code of a, or of an f16."""
        return _A_BITS[self.mode]

    @property
    def tile_k(self) -> int:
        """Codes of each row in a tile."""
        return self.tile.row_bytes * 8 // self.a_bits

    @property
    def paired(self) -> bool:
        """Whether columns are values and gates."""
        return self.epilogue.activation == "geglu"

    @property
    def padded_n(self) -> int:
        """Columns of the packed weights and of what goes with them."""
        return -(-self.n // self.tile.n) * self.tile.n

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.tile.m // self.tile.warp_m * (self.tile.n // self.tile.warp_n) * 32

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, all of it asked for at launch."""
        terms = 0 if self.group is None else 2 if self.mode == "w4a16" else 8  # bytes of each column's
        return self.tile.stages * (self.tile.m * self.tile.row_bytes + self.tile.n * (self.tile_k // 2 + terms))

    @property
    def blocks(self) -> int:
        """Blocks that are to fit on a multiprocessor, as far as registers go: the compiler keeps to it.

        With 128 registers a thread, but large tiles take more, and groups of codes a second set of accumulators. So
        does what expands both codes where a tail of K, a low rank and scales of tokens come together.
        """
        groups = self.group is not None and self.mode != "w4a16"
        expands = self.mode == "w4a4" and self.body != "s4"
        crowded = expands and self.epilogue.rank > 0 and self.epilogue.scales == "token" and self.k % self.tile_k > 0
        registers = 255 if self.tile.large or groups or crowded else 128
        return max(1, 65536 // (self.threads * registers))

    @property
    def multiplies(self) -> int:
        """Tensor core instructions of a warp in one turn of the main loop: 16 x 8 outputs by 32 bytes of a's rows.

        Raises TfqcError for body "auto": they differ between chips, see `for_arch`.
        """
        if self.body == "auto":
            raise TfqcError(f"kernel {self.name}: what it multiplies with depends on the chip")
        each = 2 if self.body == "nibble" and self.mode == "w4a4" else 1
        return (self.tile.warp_m // 16) * (self.tile.warp_n // 8) * (self.tile.row_bytes // 32) * each

    def grid(self, m: int) -> tuple[int, int, int]:
        """Blocks for m rows: along x those of M, along y those of N."""
        return -(-m // self.tile.m), self.padded_n // self.tile.n, 1

    def _problems(self) -> Iterator[str]:
        tile = self.tile
        if not _NAME.fullmatch(self.name):
            yield _MISNAMED
        if self.mode == "w4a8" and self.body != "nibble":
            yield "8-bit codes are multiplied by the nibble body"
        if (self.mode == "w4a16") != (self.body == "half"):
            yield "f16 is multiplied by the half body, which multiplies nothing else"
        if self.k <= 0 or self.k % 32:
            yield f"k = {self.k} has to be a multiple of 32"
        if tile.warp_m % 16 or tile.warp_n % 32 or tile.m % tile.warp_m or tile.n % tile.warp_n:
            yield f"{tile} has to be whole warps, and they whole instructions of 16 rows and strips of 32 columns"
        elif tile.row_bytes not in (64, 128) or tile.stages < 2:
            yield f"{tile} has to have rows of 64 or 128 bytes, and two stages"
        elif tile.m * tile.row_bytes % (self.threads * 16):
            yield f"{tile} has no whole number of copies of 16 bytes of a for a thread"
        elif self.threads % (self.tile_k // 2):
            yield f"{tile} has too few threads to copy whole rows of weights"
        elif (weights := tile.n * self.tile_k // 2) % (copied := self.threads * 16) and copied % weights:
            yield f"{tile} has no whole number of copies of 16 bytes of weights for a thread"
        if tile.large and (self.mode == "w4a16" or self.group is not None):
            yield f"{tile} has more sums than fit beside f16 weights or those of groups"
        if self.window is not None and self.k % (9 * 32):
            yield f"k = {self.k} has to be 9 times the channels, padded to 32"
        if self.group is not None and self.window is not None:
            yield "a convolution of 3 x 3 has no groups"
        if self.group is not None and (self.tile_k > self.group or tile.n % 64):
            yield f"{tile} has to be within a group of {self.group} inputs, and columns in whole 64"
        if self.mode != "w4a16" and self.group is None and self.k >= self._longest:
            yield f"k = {self.k}, but s32 holds the sums of {self._longest - 1} codes"
        if self.paired and self.n % 2:
            yield "geglu takes an even number of columns"
        if self.paired and self.padded_n < -(-self.n // 64) * 64:
            yield f"geglu writes rows of 32 outputs, {tile} half as many as its columns"
        if not _is_rank(self.epilogue.rank):
            yield _RANKS
        if self.epilogue.out == "s32" and self.epilogue != Epilogue(self.epilogue.scales, out="s32"):
            yield "s32 are the sums, with nothing done to them"
        if self.epilogue.out == "s32" and (self.mode == "w4a16" or self.group is not None):
            yield "s32 are the sums, but those of f16 or of groups are f32"

    @property
    def _longest(self) -> int:
        """The least k whose sums may not fit, with body "auto" on the chips with the longer ones."""
        most = (2**self.a_bits - 1) * 8
        factor = 1 if self.body == "s4" else 256 if self.mode == "w4a4" else 16
        return 2**31 // (most * factor)


@dataclass(frozen=True)
class Quantize:
    """Codes [rows, k padded to 32] of `bits` of f16 [rows, k]; with an `image`, of pixels with a border of one.

    bits: 16 copies the values as they are, with the padding and the border; it takes no scales.
    rank: also writes low f16 [rows, rank] = x . down, of the same read of x, for the epilogue of that rank.
    """

    name: str
    k: int
    bits: Literal[4, 8, 16]
    scales: Rows = "step"
    image: tuple[int, int] | None = None  # height, width
    rank: int = 0

    threads = 256
    shared_bytes = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise TfqcError(f"kernel {self.name}: {_MISNAMED}")
        if self.image is not None and self.scales == "token":
            raise TfqcError(f"kernel {self.name}: pixels of a convolution share their scale")
        if self.bits == 16 and self.scales == "token":
            raise TfqcError(f"kernel {self.name}: values of 16 bits are copied, without scales")
        if not _is_rank(self.rank):
            raise TfqcError(f"kernel {self.name}: {_RANKS}")
        if self.rank and (self.scales == "token" or self.image is not None or self.bits == 16):
            raise TfqcError(f"kernel {self.name}: a low rank goes with codes of rows whose scale is known before")

    @property
    def blocks(self) -> int:
        """Blocks that are to fit on a multiprocessor, as far as registers go: the sums of a high rank take many."""
        return 1 if self.rank > 64 else 2

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments in order."""
        if self.bits == 16:
            return "x", "out", "rows"
        if self.scales == "token":
            return "x", "scale", "zero", "out", "rows"
        low_rank = ("down", "low") if self.rank else ()
        return "x", "inverse", "zero", "step", "out", *low_rank, "rows"

    def grid(self, rows: int) -> tuple[int, int, int]:
        """Blocks for so many rows: 8 codes a thread, or a warp for each token; with a rank, 16 rows each."""
        if self.rank:
            return -(-rows // 16), 1, 1
        items = rows * 32 if self.scales == "token" else rows * (-(-self.k // 32) * 32 // 8)
        return -(-items // self.threads), 1, 1


Kernel = Gemm | Quantize


def for_arch(kernel: Kernel, arch: str) -> Kernel:
    """The kernel with the body that is best on a chip."""
    return replace(kernel, body=body_for(arch, kernel.mode)) if isinstance(kernel, Gemm) else kernel


def source(kernels: Sequence[Kernel]) -> str:
    """The .cu text of kernels: it includes nothing, so that NVRTC takes it as nvcc does."""
    names = [kernel.name for kernel in kernels]
    for name in names:
        if names.count(name) > 1:
            raise TfqcError(f"kernel {name}: two kernels have this name")
    files = [file for kind, file in _TEMPLATES.items() if any(isinstance(kernel, kind) for kernel in kernels)]
    parts = [
        joined(Path(__file__).parents[1] / "kernels", *files),
        *("\n".join(_entry(kernel)) + "\n" for kernel in kernels),
    ]
    return "\n".join(parts)


_TEMPLATES: dict[type[Kernel], str] = {Gemm: "gemm.cuh", Quantize: "quantize.cuh"}


_GEMM_ARGUMENTS = """\
    const u8* a, const u8* weight, const int* weight_sum, const float* weight_scale, const float* bias,
    const float* scale, const int* zero, const int* step, const u16* residual, const u16* low,
    const u16* up, const float* out_inverse, const int* out_zero, void* out, int m) {"""


def _entry(kernel: Kernel) -> Iterator[str]:
    yield f"struct {kernel.name}_constants {{"
    for line in _gemm_constants(kernel) if isinstance(kernel, Gemm) else _quantize_constants(kernel):
        yield f"  {line}"
    yield "};"
    yield ""
    yield f'extern "C" __global__ void __launch_bounds__({kernel.threads}, {kernel.blocks}) {kernel.name}('
    constants = f"{kernel.name}_constants"
    match kernel:
        case Gemm():
            yield _GEMM_ARGUMENTS
            yield "  const epilogue::Parameters parameters{weight_sum, weight_scale, bias, scale, zero, step,"
            yield "                                        residual, low, up, out_inverse, out_zero, out};"
            yield f"  gemm::run<{constants}>(a, weight, parameters, m);"
        case Quantize(bits=16):
            yield "    const u16* x, u8* out, int rows) {"
            yield f"  quantize::values<{constants}>(x, nullptr, nullptr, nullptr, out, rows);"
        case Quantize(scales="token"):
            yield "    const u16* x, float* scale, int* zero, u8* out, int rows) {"
            yield f"  quantize::tokens<{constants}>(x, scale, zero, out, rows);"
        case Quantize(rank=rank) if rank:
            yield "    const u16* x, const float* inverse, const int* zero, const int* step, u8* out, const u16* down,"
            yield "    u16* low, int rows) {"
            yield f"  quantize::values_and_low<{constants}>(x, inverse, zero, step, out, down, low, rows);"
        case Quantize():
            yield "    const u16* x, const float* inverse, const int* zero, const int* step, u8* out, int rows) {"
            yield f"  quantize::values<{constants}>(x, inverse, zero, step, out, rows);"
    yield "}"


def _gemm_constants(kernel: Gemm) -> Iterator[str]:
    end, tile, window = kernel.epilogue, kernel.tile, kernel.window
    row_bytes = kernel.k * kernel.a_bits // 8
    if window is None:
        operand = f"LinearRows<{row_bytes}>"
    else:
        operand = f"ConvRows<{row_bytes // 9}, {window.height}, {window.width}, {window.stride}>"
    yield f"static constexpr int N = {kernel.n}, K = {kernel.k}, A_BITS = {kernel.a_bits};"
    yield f"static constexpr int TILE_M = {tile.m}, TILE_N = {tile.n}, TILE_K = {kernel.tile_k};"
    yield f"static constexpr int WARP_M = {tile.warp_m}, WARP_N = {tile.warp_n};"
    yield f"static constexpr int STAGES = {tile.stages}, GROUP = {kernel.group or 0};"
    body = "BODY_OF_CHIP" if kernel.body == "auto" else f"Body::{kernel.body.upper()}"
    yield f"static constexpr Body BODY = {body};"
    yield f"static constexpr Rows SCALES = Rows::{end.scales.upper()}, OUT_SCALES = Rows::{end.out_scales.upper()};"
    yield f"static constexpr Bias BIAS = Bias::{end.bias.upper()};"
    yield f"static constexpr Activation ACTIVATION = Activation::{end.activation.upper()};"
    yield f"static constexpr bool RESIDUAL = {'true' if end.residual else 'false'};"
    yield f"static constexpr Out OUT = Out::{end.out.upper()};"
    yield f"static constexpr int RANK = {end.rank};"
    yield f"using Operand = {operand};"


def _quantize_constants(kernel: Quantize) -> Iterator[str]:
    height, width = kernel.image or (0, 0)
    yield f"static constexpr int K = {kernel.k}, BITS = {kernel.bits}, HEIGHT = {height}, WIDTH = {width};"
    yield f"static constexpr int RANK = {kernel.rank};"
    yield f"static constexpr Rows SCALES = Rows::{kernel.scales.upper()};"
