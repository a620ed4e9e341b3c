"""narrow-residual: floating point values that only kernels read are stored in bf16."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter
from tfqc.ir.match import is_call
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import Stores
from tfqc.lowering.values import MOVES
from tfqc.passing import LOSSY, Context, Numerics, Pass

# Arguments of kernels that may be bf16: parameters (bias, gate, weight, mask) are not among them.
_VALUES = {"x", "residual", "q", "k", "v"}
aten, ours = torch.ops.aten, torch.ops.tfqc
_ALSO_READ = (ours.plain.default, ours.quantize_tokens.default)
_CARRIES = (*MOVES, aten.cat.default, aten.chunk.default, operator.getitem, aten.split.Tensor)


@dataclass(frozen=True)
class NarrowResidual(Pass):
    """Halve the memory traffic between kernels; what torch reads stays f32."""

    name: ClassVar[str] = "narrow-residual"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        narrowed, edit = 0, Rewriter(program)
        for node in reversed(list(program.step.nodes)):
            stored = Stores.of(node)
            if stored is not None and stored.out == "f32" and _all_take_it(node):
                edit.update(node, out="bf16")
                narrowed += 1
        if narrowed:
            ctx.remark("stored", form="bf16", count=narrowed)


def _all_take_it(value: fx.Node) -> bool:
    return all(_takes(user, value) for user in value.users)


def _takes(reader: fx.Node, value: fx.Node) -> bool:
    if is_call(reader, *_CARRIES):
        return _all_take_it(reader)
    if not is_call(reader, *Stores.targets, *_ALSO_READ):
        return False
    return {name for name, given in reader.kwargs.items() if given is value} <= _VALUES
