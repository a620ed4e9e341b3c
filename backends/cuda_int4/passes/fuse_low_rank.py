"""fuse-low-rank: a branch of low rank is added while its product is still in registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from tfqc.analysis.rewrite import become, changed, is_branch, name_of, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.passing import Context, Numerics, Pass, close


@dataclass(frozen=True)
class FuseLowRank(Pass):
    """Take `product + low @ up`, with a stored `up` [rank, N], into the qlinear."""

    name: ClassVar[str] = "fuse-low-rank"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        fused = 0
        for node in program.nodes():
            if name_of(node) != "aten.add.Tensor" or node.kwargs:
                continue
            product, branch = node.args[:2]
            if not (isinstance(product, fx.Node) and isinstance(branch, fx.Node)):
                continue
            if not is_branch(branch) or name_of(product) != "tfqc.qlinear.default" or only_reader(product) is not node:
                continue
            low, up = branch.args
            become(program, node, product.target, changed(product, low=low, up=up))
            fused += 1
        program.prune()
        if fused:
            ctx.remark("low-rank-fused", count=fused)
