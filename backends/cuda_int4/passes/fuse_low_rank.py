"""fuse-low-rank: a branch of low rank is added while its product is still in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import call, capture
from tfqc.ir.program import Program, Stage
from tfqc.lowering.values import branch_of
from tfqc.passing import Context, Numerics, Pass, close

aten, ours = torch.ops.aten, torch.ops.tfqc


@dataclass(frozen=True)
class FuseLowRank(Pass):
    """Take `product + low @ up`, with a stored `up` [rank, N], into the qlinear."""

    name: ClassVar[str] = "fuse-low-rank"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        if fused := rewrite(program, [Rule(_SUM, _fuse)]):
            ctx.remark("low-rank-fused", count=fused)


def _fuse(edit: Rewriter, node: fx.Node, product: fx.Node, branch: fx.Node) -> None:
    halves = branch_of(branch)
    assert halves is not None
    edit.become(node, product.target, **{**product.kwargs, "low": halves.self_, "up": halves.other})


_SUM = call(
    aten.add.Tensor,
    self=call(ours.qlinear.default, name="product", once=True),
    other=capture("branch", lambda value: branch_of(value) is not None),
    alpha=1,
)
