"""lower-int8: quantized linears and convolutions become integer products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfqc.backends.cpu_int8.integer import why_not_integer
from tfqc.ir.edit import Rewriter
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Conv, Linear
from tfqc.lowering.products import Products
from tfqc.passing import Context, Numerics, Pass, close


@dataclass(frozen=True)
class LowerInt8(Pass):
    """Multiply codes by codes in @step, where `dequantize` feeds a linear or convolution whose weight is stored codes.

    `tfqc.backends.cpu_int8.integer` says what stays in floating point, and why. Nothing happens to @begin and @time.
    """

    name: ClassVar[str] = "lower-int8"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        lowered, products = 0, Products(Rewriter(program))
        for node in program.nodes():
            layer = Linear.of(node) or Conv.of(node)
            if layer is not None and not why_not_integer(program, layer):
                products.lower(layer)
                lowered += 1
        program.prune()
        if lowered:
            ctx.remark("lowered", to="int8", count=lowered)
