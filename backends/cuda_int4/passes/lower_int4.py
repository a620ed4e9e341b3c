"""lower-int4: linears and convolutions with 4-bit weights become products that tensor cores run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.analysis.rewrite import name_of
from tfqc.analysis.weighted import WEIGHTED
from tfqc.backends.cuda_int4.tensor_cores import why_not_tensor_cores
from tfqc.ir.program import Program, Stage
from tfqc.lowering.products import Inputs, become_product
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
        lowered = 0
        inputs: Inputs = {}
        weights: dict[str, str] = {}
        for node in program.nodes():
            if name_of(node) not in WEIGHTED or why_not_tensor_cores(program, node):
                continue
            read = node.args[0]
            assert isinstance(read, fx.Node)
            if read not in inputs and name_of(read) != "tfqc.quantize_dynamic.default":
                inputs[read] = _input(program, read)
            become_product(program, node, inputs, weights)
            lowered += 1
        program.prune()
        if lowered:
            ctx.remark("lowered", to="tensor cores", count=lowered)


def _input(program: Program, read: fx.Node) -> tuple[Any, ...]:
    """Codes that a kernel stores, their scale, zero point and row; of values only themselves."""
    if name_of(read) != "tfqc.dequantize.default":
        return (read, None, None, None)
    codes = read.args[0]
    assert isinstance(codes, fx.Node)
    x, scale, zero_point, row, _, high = codes.args
    args = (x, "none", row, scale, zero_point, "u4" if high == 15 else "u8")
    stored = program.insert(read, torch.ops.tfqc.map.default, args, name=f"{codes.name}_codes", like=codes)
    return (stored, scale, zero_point, row)
