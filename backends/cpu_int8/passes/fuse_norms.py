"""fuse-norms: norms, activations, additions and quantizers that stand alone become kernels' operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.ir.edit import Rewriter, Rule, rewrite
from tfqc.ir.match import Call, call, capture, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.ir.views import GroupNorm, GroupNormRows, LayerNorm, LayerNormRows
from tfqc.lowering.activations import activation_of, geglu_end
from tfqc.lowering.values import keeps_batch
from tfqc.passing import Context, Numerics, Pass, close

aten, ours = torch.ops.aten, torch.ops.tfqc


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Rewrite norms, SiLU, GELU, GEGLU, additions and quantizers as tfqc operations; activations join their norm."""

    name: ClassVar[str] = "fuse-norms"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        rewrite(program, RULES)


def _norm(edit: Rewriter, node: fx.Node) -> bool:
    by_group, by_layer = GroupNorm.of(node) or GroupNormRows.of(node), LayerNorm.of(node) or LayerNormRows.of(node)
    if not keeps_batch(edit.program, node) or (by_layer and len(by_layer.shape) != 1):
        return False
    norm = by_group or by_layer
    assert norm is not None
    groups = by_group.groups if by_group else 0
    operands: dict[str, Any] = {
        "x": norm.input,
        "groups": groups,
        "weight": norm.weight,
        "bias": norm.bias,
        "eps": norm.eps,
    }
    reader = only_reader(node)
    edit.become(node, ours.norm.default, **operands)
    if reader is not None and activation_of(reader) == "silu":
        edit.become(reader, ours.norm.default, **operands, act="silu")
    return True


def _activation(edit: Rewriter, node: fx.Node, x: fx.Node) -> bool:
    if not _is_dense(edit.program, node):
        return False
    edit.become(node, ours.map.default, x, activation_of(node))
    return True


def _geglu(edit: Rewriter, node: fx.Node, x: fx.Node) -> bool:
    end = geglu_end(edit.program, node)
    if end is None or not _is_dense(edit.program, x):
        return False
    edit.become(end, ours.map.default, x, "geglu")
    return True


def _quantize(
    edit: Rewriter, node: fx.Node, x: fx.Node, scale: fx.Node, zero_point: fx.Node, row: fx.Node | None
) -> bool:
    if not keeps_batch(edit.program, node):
        return False
    edit.become(node, ours.map.default, x, row=row, out_scale=scale, out_zero_point=zero_point, out="u8")
    return True


def _add(edit: Rewriter, node: fx.Node, a: Any, b: Any) -> bool:
    types = edit.program.types
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or not _is_dense(edit.program, node):
        return False
    if not types[a.name] == types[b.name] == types[node.name]:
        return False
    edit.become(node, ours.gated_add.default, a, residual=b)
    return True


def _is_dense(program: Program, node: Any) -> bool:
    """True for f32 [B, ...] of several dimensions: what waits for the sample, and not for rows alone."""
    type_ = program.tensor_type(node)
    return type_ is not None and type_.dtype is torch.float32 and len(type_.shape) > 2 and keeps_batch(program, node)


def _codes() -> Call:
    read: dict[str, Any] = {name: capture(name) for name in ("x", "scale", "zero_point", "row")}
    return call(ours.quantize.default, **read, qmin=0, qmax=255)


RULES = [
    Rule(call(*GroupNorm.targets, *LayerNorm.targets, *GroupNormRows.targets, *LayerNormRows.targets), _norm),
    Rule(call(aten.silu.default, aten.gelu.default, self=capture("x")), _activation),
    Rule(call(aten.chunk.default, self=capture("x")), _geglu),
    Rule(_codes(), _quantize),
    Rule(call(aten.add.Tensor, self=capture("a"), other=capture("b"), alpha=1), _add),
]
