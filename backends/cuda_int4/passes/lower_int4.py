"""lower-int4: linears and convolutions with 4-bit weights become products that tensor cores run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.backends.cuda_int4.tensor_cores import why_not_tensor_cores
from tfqc.ir.edit import Rewriter
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Conv, Dequantize, Linear, Quantize, QuantizeDynamic
from tfqc.lowering.products import Codes, Products
from tfqc.passing import Context, Numerics, Pass, close


@dataclass(frozen=True)
class LowerInt4(Pass):
    """Multiply codes of 4 or 8 bits, or values, by 4-bit codes in @step, where kernels do.

    `tfqc.backends.cuda_int4.tensor_cores` says what stays as it is, and why. Nothing happens to @begin and @time.
    """

    name: ClassVar[str] = "lower-int4"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        lowered, products = 0, Products(Rewriter(program))
        for node in program.nodes():
            layer = Linear.of(node) or Conv.of(node)
            if layer is None or why_not_tensor_cores(program, layer):
                continue
            if layer.input not in products.inputs and QuantizeDynamic.of(layer.input) is None:
                products.inputs[layer.input] = _codes(products.edit, layer.input)
            products.lower(layer)
            lowered += 1
        program.prune()
        if lowered:
            ctx.remark("lowered", to="tensor cores", count=lowered)


def _codes(edit: Rewriter, read: fx.Node) -> Codes:
    """Codes that a kernel stores; of values only themselves."""
    known = Dequantize.of(read)
    made = Quantize.of(known.codes) if known else None
    if made is None:
        return Codes(read)
    ending = {"row": made.row, "out_scale": made.scale, "out_zero_point": made.zero_point}
    out = "u4" if made.qmax == 15 else "u8"
    name = f"{made.node.name}_codes"
    stored = edit.insert(read, torch.ops.tfqc.map.default, made.x, **ending, out=out, name=name, like=made.node)
    return Codes(stored, made.scale, made.zero_point, made.row)
