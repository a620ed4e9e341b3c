"""split-low-rank: a small branch in f16 takes the greatest part of a weight, so that quantizing the rest costs less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from tfqc.analysis.binding import binding_times
from tfqc.analysis.weighted import weight_of
from tfqc.ir.edit import Rewriter
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import BindingTime, Maintenance, Tib
from tfqc.ir.tables import Fact, Row
from tfqc.ir.views import Linear
from tfqc.passing import Context, Numerics, Pass, close


@dataclass(frozen=True)
class SplitLowRank(Pass):
    """Write linears of the sample as x W^T = x R^T + (x down) up, R = W - (down up)^T, with the best factors of a rank.

    Linears that read the same value share `down`. Source: SVDQuant (arXiv 2411.05007), without its smoothing. Factors
    are rounded to f16 before R is taken, so that what they leave is quantized with it.
    """

    name: ClassVar[str] = "split-low-rank"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.CALIBRATED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    preserves: ClassVar[frozenset[type[Row]]] = frozenset({BindingTime, Tib, Maintenance})
    numerics: ClassVar[Numerics] = close(1e-5)

    rank: int = 32

    def __post_init__(self) -> None:
        if self.rank % 16 or not 0 < self.rank <= 128:
            raise ValueError(f"rank={self.rank}: multiples of 16 up to 128")

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        readers: dict[fx.Node, list[fx.Node]] = {}
        roles = binding_times(program)
        for node in program.nodes():
            linear = Linear.of(node)
            if linear is None or weight_of(node) is None or node.name in program.table(Tib):
                continue
            if Role.SAMPLE in roles[linear.input.name]:
                readers.setdefault(linear.input, []).append(node)
        split, edit = 0, Rewriter(program)
        for nodes in ctx.progress.track(readers.values(), "splitting weights", len(readers)):
            x = Linear(nodes[0]).input  # which may be what a linear before was split into
            weights = [program.tensors[str(weight_of(n))].float() for n in nodes]
            if min(weights[0].shape[1], sum(len(w) for w in weights)) > self.rank:
                self._split(edit, x, nodes, weights)
                split += len(nodes)
        program.prune()
        if split:
            ctx.remark("split-off", rank=self.rank, linears=split)

    def _split(self, edit: Rewriter, x: fx.Node, nodes: list[fx.Node], weights: list[Tensor]) -> None:
        program, matmul = edit.program, torch.ops.aten.matmul.default
        down, ups = low_rank(torch.cat(weights), self.rank)
        # By the weight's name, but of this value's readers alone: others may read the same weight.
        name = program.add_tensors(str(weight_of(nodes[0])), {"down": down})[0]
        low = edit.insert(nodes[0], matmul, x, program.tensor_node(name), name=f"{nodes[0].name}_low")
        made: dict[str, list[str]] = {}
        for node, weight, up in zip(nodes, weights, ups.split([len(w) for w in weights], 1), strict=True):
            base = str(weight_of(node))
            if base not in made:
                rest = weight if weight.is_meta else weight - (down @ up).T
                made[base] = program.add_tensors(base, {"up": up.contiguous(), "rest": rest})
            up_name, rest_name = made[base]
            edit.update(node, weight=program.tensor_node(rest_name))
            up_node = program.tensor_node(up_name)
            branch = edit.insert(node.next, matmul, low, up_node, name=f"{node.name}_branch", like=node)
            users = list(node.users)
            add = torch.ops.aten.add.Tensor
            whole = edit.insert(branch.next, add, node, branch, name=f"{node.name}_whole", like=node)
            for user in users:
                edit.reread(user, node, whole)


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [K, rank] and up [rank, N], of values that f16 holds: (down up)^T is as near to weight [N, K] as can be."""
    if weight.is_meta:
        return weight.new_empty(weight.shape[1], rank), weight.new_empty(rank, len(weight))
    wide = weight.to(torch.float64)
    _, vectors = torch.linalg.eigh(wide.T @ wide)  # ascending
    down = vectors[:, -rank:].to(torch.float16).to(torch.float64)
    up = torch.linalg.lstsq(down, wide.T).solution.to(torch.float16)  # best for the rounded down
    return down.to(weight.dtype).contiguous(), up.to(weight.dtype)
