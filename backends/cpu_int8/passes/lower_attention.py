"""lower-attention: scaled dot product attention becomes the kernels' operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from tfqc.backends.cpu_int8.integer import why_not_attention
from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import call
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Attention
from tfqc.passing import Context, Numerics, Pass, close


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Rewrite attention that has four dimensions, no dropout and no causal mask; `mode` says how kernels multiply.

    fp32: all in f32. bf16: bf16 products summed in f32. int8: queries times keys in int8, the keys' mean taken off,
    probabilities times values in 16 bits.
    """

    name: ClassVar[str] = "lower-attention"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    mode: Literal["fp32", "bf16", "int8"] = "int8"

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        rewrite(program, [Rule(call(*Attention.targets), self._lower)])

    def _lower(self, edit: Rewriter, node: fx.Node) -> bool:
        its = Attention(node)
        type_ = edit.program.tensor_type(its.query)
        if why_not_attention(edit.program, its) or type_ is None or not isinstance(type_.shape[-1], int):
            return False
        scale = its.scale or 1 / math.sqrt(type_.shape[-1])
        operands = (its.query, its.key, its.value, its.mask, scale, self.mode)
        edit.become(node, torch.ops.tfqc.attention.default, *operands)
        return True
