"""lower-int8: quantized linears and convolutions become integer products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tfqc.analysis.rewrite import name_of
from tfqc.analysis.weighted import WEIGHTED
from tfqc.backends.cpu_int8.integer import why_not_integer
from tfqc.ir.program import Program, Stage
from tfqc.lowering.products import Inputs, become_product
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
        lowered = 0
        inputs: Inputs = {}
        weights: dict[str, str] = {}
        for node in program.nodes():
            if name_of(node) not in WEIGHTED:
                continue
            if not why_not_integer(program, node):
                become_product(program, node, inputs, weights)
                lowered += 1
        program.prune()
        if lowered:
            ctx.remark("lowered", to="int8", count=lowered)
