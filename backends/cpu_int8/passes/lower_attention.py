"""lower-attention: scaled dot product attention becomes the kernels' operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tfqc.analysis.rewrite import become, name_of
from tfqc.backends.cpu_int8.integer import why_not_attention
from tfqc.ir.program import Program, Stage
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
        for node in program.nodes():
            if name_of(node) != "aten.scaled_dot_product_attention.default":
                continue
            if why_not_attention(program, node):
                continue
            q, k, v, mask = (*node.args[:4], None)[:4]
            type_ = program.tensor_type(q)  # type: ignore[arg-type]
            assert type_ is not None and isinstance(type_.shape[-1], int)
            scale = node.kwargs.get("scale") or 1 / math.sqrt(type_.shape[-1])
            ending = (None, None, None, "f32")
            become(program, node, torch.ops.tfqc.attention.default, (q, k, v, mask, scale, self.mode, *ending))
