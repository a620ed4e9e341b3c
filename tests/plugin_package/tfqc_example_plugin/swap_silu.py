"""swap-silu: SiLU as a sigmoid and a product, for targets that have no SiLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tfqc.ir.program import Program, Stage
from tfqc.passing import Context, Numerics, Pass, close

aten = torch.ops.aten


@dataclass(frozen=True)
class SwapSilu(Pass):
    """Rewrite silu(x) into x * sigmoid(x).

    Options: limit, how many of them, in the order of the program; none = all.
    """

    name: ClassVar[str] = "swap-silu"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    preserves: ClassVar[frozenset[str]] = frozenset({"quantizer", "rows", "schedule"})
    numerics: ClassVar[Numerics] = close(1e-6)

    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit={self.limit} is negative")

    def run(self, program: Program, ctx: Context) -> None:
        """Replace each node by two, in every function."""
        silus = [(f, n) for f in program.functions for n in program.nodes(f) if n.target is aten.silu.default]
        silus = silus[: self.limit]
        for function, node in silus:
            (x,) = node.all_input_nodes
            gate = program.insert(node, aten.sigmoid.default, (x,), function=function)
            program.replace(node, program.insert(node, aten.mul.Tensor, (x, gate), function=function))
        ctx.report.append(f"{len(silus)} SiLUs swapped")
