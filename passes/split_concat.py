"""split-concat: what multiplies concatenated values becomes a sum of products, so that each value has its own scale."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from tfqc.analysis.binding import Roles, binding_times
from tfqc.analysis.weighted import QUANTIZED, WEIGHTED, weight_of
from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import call, capture
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import BindingTime, Maintenance, QuantPlan, Tib
from tfqc.ir.tables import Fact, Row
from tfqc.passing import Context, Numerics, Pass, close

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitConcat(Pass):
    """Write W cat(a, b) + c, a linear or convolution of the channels of several values, as Wb b + (Wa a + c).

    What else reads the concatenation goes on reading it. Left as they are: convolutions in groups, the temporal
    information block, and what concatenates a value that does not depend on the sample. What is planned for a layer is
    planned for its parts; run before planning, each part counts as a layer (the first part of the first layer as the
    first). Source: Q-Diffusion (arXiv 2302.04304), shortcut-splitting quantization.

    On cpu-int8 and cuda-int4 the parts are integer products with scales of their own. Their sums differ in scale, so
    they are not added as integers: one's result is the residual that the other's epilogue adds (fuse-epilogues).
    """

    name: ClassVar[str] = "split-concat"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.CALIBRATED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    preserves: ClassVar[frozenset[type[Row]]] = frozenset({BindingTime, Tib, Maintenance})
    numerics: ClassVar[Numerics] = close(1e-5)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        concat = call(aten.cat.default, tensors=capture("values", lambda v: isinstance(v, list)), dim=capture("dim"))
        rule = Rule(call(*QUANTIZED, input=concat), partial(_split, binding_times(program)))
        if count := rewrite(program, [rule]):
            ctx.remark("concat-split", count=count)


def _split(roles: dict[str, Roles], edit: Rewriter, node: fx.Node, values: list[fx.Node], dim: int) -> bool:
    """Let a node be the sum of products of `values`; False where it is left as it is."""
    program, its, weight = edit.program, WEIGHTED[node.target], weight_of(node)
    if weight is None or node.name in program.table(Tib) or (its.groups and node.kwargs[its.groups] != 1):
        return False
    whole = program.tensor_type(node.kwargs[its.input])  # type: ignore[arg-type]
    types = [program.tensor_type(value) for value in values]
    assert whole is not None
    channels, rank = len(whole.shape) - 1 - its.windows, len(whole.shape)
    sizes = [t.shape[channels] for t in types if t and len(t.shape) == rank and t.dtype == whole.dtype]
    known = len(sizes) == len(values) > 1 and all(isinstance(size, int) and size > 0 for size in sizes)
    if not known or dim % rank != channels or any(Role.SAMPLE not in roles[v.name] for v in values):
        return False
    pieces = program.tensors[weight].split(sizes, 1)  # type: ignore[arg-type]
    parts = {f"part{i}": p.clone(memory_format=torch.contiguous_format) for i, p in enumerate(pieces)}
    plan, made = program.tables.get(QuantPlan.table, {}), list[fx.Node]()
    row = plan.pop(node.name, None)
    for value, name in zip(values, program.add_tensors(weight, parts), strict=True):
        own = {its.input: value, its.weight: edit.read(node, name), **({its.bias: None} if made else {})}
        made.append(edit.insert(node, node.target, **{**node.kwargs, **own}, name=f"{node.name}_part", like=node))
        if row is not None:
            plan[made[-1].name] = row
    total, *others, last = made
    for part in others:
        total = edit.insert(node, aten.add.Tensor, total, part, name=f"{node.name}_sum", like=node)
    edit.become(node, aten.add.Tensor, self=last, other=total)
    return True
