"""plan-memory: which values share a buffer, and how long each buffer is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from tfqc.ir.match import is_call
from tfqc.ir.ops import is_view
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Memory
from tfqc.ir.tables import Fact
from tfqc.ir.views import Stores
from tfqc.passing import EXACT, Context, Numerics, Pass

# What kernels write beside the operations that say how they store their result.
aten, ours = torch.ops.aten, torch.ops.tfqc
_ALSO_WRITTEN = (
    aten.cat.default, aten.upsample_nearest2d.vec, ours.channels_last.default, ours.plain.default,
)  # fmt: skip


@dataclass(frozen=True)
class PlanMemory(Pass):
    """Give each value that a kernel writes a buffer and say when it lives; views live in their source's buffer.

    A residual sum overwrites what it adds to, where nothing reads that later. Offsets follow when sizes are known.
    """

    name: ClassVar[str] = "plan-memory"
    needs: ClassVar[Stage] = Stage.LOWERED
    provides: ClassVar[frozenset[Fact]] = frozenset({Memory})
    numerics: ClassVar[Numerics] = EXACT

    def run(self, program: Program, ctx: Context) -> None:
        """Fill the `memory` table for @step."""
        order = {node: i for i, node in enumerate(program.step.nodes)}
        owner: dict[fx.Node, fx.Node] = {}  # of a value: the node whose buffer it lies in
        last: dict[fx.Node, int] = {}
        for node in program.step.nodes:
            for operand in node.all_input_nodes:
                if operand in owner:
                    last[owner[operand]] = order[node]
            if is_view(node) and node.all_input_nodes and node.all_input_nodes[0] in owner:
                owner[node] = owner[node.all_input_nodes[0]]
            elif is_call(node, *Stores.targets, *_ALSO_WRITTEN):
                owner[node] = node
                last[node] = order[node]
        buffer: dict[fx.Node, int] = {}
        rows: dict[str, Memory] = {}
        for node in [n for n in program.step.nodes if owner.get(n) is n]:
            victim = _overwritten(program, node, owner)
            if victim is not None and last[victim] == order[node]:
                buffer[node] = buffer[victim]
            else:
                buffer[node] = len(set(buffer.values()))
            rows[node.name] = Memory(buffer[node], order[node], last[node])
        program.set_table(Memory, rows)
        if rows:
            shared = len(rows) - len(set(buffer.values()))
            ctx.remark("memory", values=len(rows), shared=shared)


def _overwritten(program: Program, node: fx.Node, owner: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The node whose buffer the result may take: each element of a residual is read just before the sum is written."""
    operand = node.kwargs.get("residual")
    if not isinstance(operand, fx.Node) or operand not in owner:
        return None
    mine, its = program.tensor_type(node), program.tensor_type(operand)
    if mine is None or its is None or mine.dtype is not its.dtype or mine.shape != its.shape:
        return None
    whole = program.tensor_type(owner[operand])
    reads = [n for n in node.all_input_nodes if n is not operand and owner.get(n) is owner[operand]]
    return owner[operand] if whole is not None and not reads and _same_size(whole.shape, its.shape) else None


def _same_size(a: tuple[int | str, ...], b: tuple[int | str, ...]) -> bool:
    def size(shape: tuple[int | str, ...]) -> tuple[int, list[str]]:
        product = 1
        for dim in shape:
            product *= dim if isinstance(dim, int) else 1
        return product, sorted(d for d in shape if isinstance(d, str))

    return size(a) == size(b)
