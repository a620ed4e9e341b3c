"""Which kernel runs an operation of a lowered step, and how its operands lie in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from torch import fx

from tfqc.backends.cuda_int4.runtime.specialise import (
    Body,
    Epilogue,
    Gemm,
    Kernel,
    Mode,
    Quantize,
    Rows,
    Tile,
    Window,
    body_for,
)
from tfqc.backends.cuda_int4.tensor_cores import is_step_row
from tfqc.backends.cuda_int4.tile_choice import tile_for
from tfqc.ir.match import item_of
from tfqc.ir.program import Program
from tfqc.ir.types import TensorType, evaluate
from tfqc.ir.views import Map, Product, QConv, QuantizeTokens, Stores
from tfqc.lowering.windows import window_of

K = TypeVar("K", Gemm, Quantize)
_BITS: dict[str, Literal[4, 8]] = {"u4": 4, "u8": 8}

_COMMON = "sm_89"  # the chip for which tiles are chosen where one text serves all of them


@dataclass
class Selection:
    """The kernels of a program, each once, in the order in which they are first used.

    arch: as the target has it; `fat` is for all.
    """

    program: Program
    arch: str
    kernels: dict[str, Kernel] = field(default_factory=dict[str, Kernel])

    def product(self, product: Product) -> Gemm:
        """Of a qlinear or qconv."""
        node, types, conv = product.node, self.program.types, QConv.of(product.node)
        weight, x, y = types[product.weight.name], types[product.codes.name], types[node.name]
        assert isinstance(weight, TensorType) and isinstance(x, TensorType) and isinstance(y, TensorType)
        n, channels, *taps = (int(size) for size in weight.shape)
        image = window_of(self.program, node)
        window = None if image is None else Window(*image, conv.stride if conv else 1)
        mode = self._mode(product)
        scales = self.program.tensor_type(product.weight_scale)
        group: Literal[128] | None = 128 if scales is not None and len(scales.shape) > 1 else None
        end = Epilogue(
            scales=_rows(product.scale, product.row_in),
            bias=_bias(self.program, product.bias),
            activation=product.act,
            residual=product.residual is not None,
            out=product.out,
            rank=_rank(self.program, product.up),
            out_scales="step" if product.out_scale is None or product.row is not None else "one",
        )
        k = _whole(channels) * (9 if window else 1)
        lead = y.shape[:-1] if product.is_linear else (y.shape[0], *y.shape[2:])
        rows = math.prod(evaluate(size, self.program.symbols) for size in lead)
        shape = f"{n}x{k}" if window is None else f"{n}x{k}_{window.height}x{window.width}_s{window.stride}"
        what = "linear" if product.is_linear else f"conv{taps[0]}x{taps[1]}"
        made = Gemm(
            f"tfqc_{what}_{shape}",
            n,
            k,
            mode,
            self._body(mode),
            end,
            window,
            self._tile(n, k, rows, mode, product.act == "geglu", group),
            group,
        )
        return self._add(made)

    def quantizer(self, codes: Map, windowed: bool, rank: int = 0) -> Quantize:
        """Of a map that stores codes, as rows or as an image with a border; rank: of a branch that it begins."""
        channels, image = self._pixels(codes.x, is_image(codes.node))
        image = image if windowed else None
        name = f"tfqc_quantize{_BITS[codes.out]}_{channels}" + (f"_{image[0]}x{image[1]}" if image else "")
        scales = _rows(codes.out_scale, codes.row)
        return self._add(Quantize(f"{name}_r{rank}" if rank else name, channels, _BITS[codes.out], scales, image, rank))

    def copier(self, product: Product, windowed: bool) -> Quantize | None:
        """Of the values that a product reads as they are; None if they lie as it reads them."""
        channels, image = self._pixels(product.codes, not product.is_linear)
        if windowed and image:
            return self._add(Quantize(f"tfqc_copy_{channels}_{image[0]}x{image[1]}", channels, 16, image=image))
        return self._add(Quantize(f"tfqc_copy_{channels}", channels, 16)) if channels % 32 else None

    def tokens(self, tokens: QuantizeTokens) -> Quantize:
        """Of a quantize_tokens."""
        channels, _ = self._pixels(tokens.x, False)
        bits: Literal[4, 8] = 4 if tokens.bits == 4 else 8
        return self._add(Quantize(f"tfqc_quantize{bits}_{channels}_tokens", channels, bits, "token"))

    def _pixels(self, value: fx.Node, image: bool) -> tuple[int, tuple[int, int] | None]:
        """Channels of a value, and the size of its images if it has any."""
        x = self.program.types[value.name]
        assert isinstance(x, TensorType)
        if not image:
            return int(x.shape[-1]), None
        return int(x.shape[1]), (int(x.shape[2]), int(x.shape[3])) if _static(x) else None

    def _mode(self, product: Product) -> Mode:
        if product.scale is None:
            return "w4a16"
        if tokens := QuantizeTokens.of(_maker(product.codes)):
            return "w4a4" if tokens.bits == 4 else "w4a8"
        stored = Stores.of(product.codes)
        return "w4a4" if stored is not None and stored.out == "u4" else "w4a8"

    def _tile(self, n: int, k: int, rows: int, mode: Mode, paired: bool, group: int | None) -> Tile:
        """Of so many rows, in a batch of the size that the program knows as an example; see `tiles.py`."""
        if mode != "w4a16" and group is None:
            return tile_for(n, k, rows, mode, _COMMON if self.arch == "fat" else self.arch, paired)
        wide = n > 64 and -(-n // 128) * 128 - n < 64  # else 128 columns would be half empty
        longer = mode == "w4a8"  # turns, of which each group then has one
        return Tile(128 if rows > 64 else 64, 128 if wide else 64, 128 if longer else 64)

    def _body(self, mode: Mode) -> Body:
        return "auto" if self.arch == "fat" and mode == "w4a4" else body_for(self.arch, mode)

    def _add(self, kernel: K) -> K:
        """The kernel under a name of its own, or the one that is there and the same."""
        for name in _names(kernel.name):
            named = replace(kernel, name=name)
            if self.kernels.setdefault(name, named) == named:
                return named
        raise AssertionError


def _maker(codes: fx.Node) -> fx.Node:
    item = item_of(codes)
    return item[0] if item else codes


def is_image(node: fx.Node) -> bool:
    """True for a quantizer of images [B, C, H, W]: one that convolutions read."""
    return any(QConv.of(user) for user in node.users)


def _static(type_: TensorType) -> bool:
    return all(isinstance(size, int) for size in type_.shape[2:])


def _names(base: str) -> Iterator[str]:
    yield base
    number = 1
    while True:
        yield f"{base}_{number}"
        number += 1


def _rows(scale: Any, row: Any) -> Rows:
    """Whether scales are one, the step's, or each token's."""
    if item_of(scale):
        return "token"
    return "one" if row is None else "step"


def _bias(program: Program, bias: Any) -> Literal["none", "one", "step"]:
    if bias is None:
        return "none"
    return "step" if is_step_row(program, bias) else "one"


def _rank(program: Program, up: fx.Node | None) -> int:
    if up is None:
        return 0
    type_ = program.types[up.name]
    assert isinstance(type_, TensorType)
    return int(type_.shape[0])


def _whole(codes: int) -> int:
    """Codes of a row with its padding."""
    return -(-codes // 32) * 32
