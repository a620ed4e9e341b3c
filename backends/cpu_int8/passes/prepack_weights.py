"""prepack-weights: weight codes are stored in the order in which kernels read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_stored
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Product, QConv
from tfqc.passing import EXACT, Context, Numerics, Pass
from tfqc.runtime.packing import pack_int4
from tfqc.runtime.tiles import pack, sums, tiles_shape


@dataclass(frozen=True)
class PrepackWeights(Pass):
    """Store codes in tiles (`tfqc.runtime.tiles`), two a byte where 4 bits hold them and `bits` is 4.

    bits: of what is stored; products are 8-bit ones in any case.
    """

    name: ClassVar[str] = "prepack-weights"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = EXACT

    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} is out of range: 4 or 8 bits are stored")

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        packed: dict[tuple[str, int, bool], list[str]] = {}  # (codes, groups, paired): tiles and sums
        edit = Rewriter(program)
        products = [found for n in program.nodes() if (found := Product.of(n))]
        for product in ctx.progress.track(products, "packing weights"):
            if is_stored(product.weight):
                edit.update(product.node, weight=_packed(edit, product, self.bits, packed))
        program.prune()


def _packed(edit: Rewriter, product: Product, bits: int, packed: dict[tuple[str, int, bool], list[str]]) -> fx.Node:
    program, stored = edit.program, str(product.weight.target)
    codes = program.tensors[stored]
    conv = QConv.of(product.node)
    groups, paired = conv.groups if conv else 1, product.act == "geglu"
    narrow = bits == 4 and (codes.is_meta or bool(((codes >= -8) & (codes <= 7)).all()))
    if (stored, groups, paired) not in packed:
        if codes.is_meta:
            tiles = torch.empty(tiles_shape(codes.shape, groups), dtype=torch.int8, device="meta")
            count = (tiles.numel() + 1) // 2
            tiles = torch.empty(count, dtype=torch.uint8, device="meta") if narrow else tiles
        else:
            tiles = pack(codes, groups, paired)
            tiles = pack_int4(tiles) if narrow else tiles
        name = stored.removesuffix("codes") + ("pairs" if paired else "tiles") + ("4" if narrow else "")
        made = {"": tiles, "sums": sums(codes, groups, paired)}  # the run time finds the sums by the tiles' name
        packed[stored, groups, paired] = program.add_tensors(name, made)
    tiles_node, sums_node = (program.tensor_node(name) for name in packed[stored, groups, paired])
    return edit.insert(
        product.node,
        torch.ops.tfqc.unpack_tiles.default,
        packed=tiles_node,
        sums=sums_node,
        shape=list(codes.shape),
        groups=groups,
        paired=paired,
        bits=4 if narrow else 8,
        name=f"{product.node.name}_weight",
    )
