"""swap-silu: SiLU as a sigmoid and a product, for targets that have no SiLU; or as the plug-in's own operation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tfqc.ir.edit import Rewriter
from tfqc.ir.ops import register
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer
from tfqc.ir.tables import Fact, Row, row_kind
from tfqc.passing import Context, Numerics, Pass, close
from tfqc.passing.remarks import remark_kind

aten = torch.ops.aten

_LIBRARY = torch.library.Library("tfqc_example", "DEF")
_LIBRARY.define("gate(Tensor x, Tensor by) -> Tensor")
_LIBRARY.impl("gate", lambda x, by: x * torch.sigmoid(by), "CompositeImplicitAutograd")
register(torch.ops.tfqc_example.gate.default)

SWAPPED = remark_kind("tfqc-example-swapped", "{count} {count:|SiLU|SiLUs} swapped")


@row_kind
@dataclass(frozen=True)
class Swapped(Row):
    """What a value was before it was swapped."""

    table: ClassVar[str] = "tfqc-example-swapped"
    inline: ClassVar[bool] = True
    was: str


@dataclass(frozen=True)
class SwapSilu(Pass):
    """Rewrite silu(x) into x * sigmoid(x).

    Options: limit, how many of them, in the order of the program; none = all. own, as one operation of the plug-in,
    and a row of its table that tells.
    """

    name: ClassVar[str] = "swap-silu"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    preserves: ClassVar[frozenset[type[Row]]] = frozenset({Quantizer})
    provides: ClassVar[frozenset[Fact]] = frozenset({Swapped})
    numerics: ClassVar[Numerics] = close(1e-6)

    limit: int | None = None
    own: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit={self.limit} is negative")

    def run(self, program: Program, ctx: Context) -> None:
        """Replace each node by two, in every function."""
        silus = [(f, n) for f in program.functions for n in program.nodes(f) if n.target is aten.silu.default]
        silus = silus[: self.limit]
        rows = dict(program.table(Swapped))
        for function, node in silus:
            edit, (x,) = Rewriter(program, function), node.all_input_nodes
            if self.own:
                edit.become(node, torch.ops.tfqc_example.gate.default, x, by=x)
                rows[node.name] = Swapped("silu")
                continue
            gate = edit.insert(node, aten.sigmoid.default, x)
            edit.replace(node, edit.insert(node, aten.mul.Tensor, x, gate))
        program.set_table(Swapped, rows)
        ctx.remark(SWAPPED, count=len(silus))
