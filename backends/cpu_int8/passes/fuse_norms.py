"""fuse-norms: norms, activations, additions and quantizers that stand alone become kernels' operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from tfqc.analysis.rewrite import become, keeps_batch, name_of, only_reader
from tfqc.ir.program import Program, Stage
from tfqc.lowering.activations import geglu_end, gelu_kind
from tfqc.passing import Context, Numerics, Pass, close

ours = torch.ops.tfqc
FLOAT = (None, None, None, "f32")  # an ending that stores what there is


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Rewrite norms, SiLU, GELU, GEGLU, additions and quantizers as tfqc operations; activations join their norm."""

    name: ClassVar[str] = "fuse-norms"
    needs: ClassVar[Stage] = Stage.LOWERED
    numerics: ClassVar[Numerics] = close(1e-4)

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step."""
        for node in program.nodes():
            if node.op == "call_function" and (rewrite := _REWRITES.get(name_of(node))):
                rewrite(program, node)
        program.prune()


def _norm(program: Program, node: fx.Node) -> None:
    name = name_of(node)
    x, *rest = node.args
    if "group_norm" in name:
        groups, weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) - 1 :])[:4]
    else:
        shape, weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) - 1 :])[:4]
        if len(shape) != 1:  # type: ignore[arg-type]
            return
        groups = 0
    if not keeps_batch(program, node):
        return
    become(program, node, ours.norm.default, (x, groups, weight, bias, eps, "none", *FLOAT))
    reader = only_reader(node)
    if name_of(reader) == "aten.silu.default":
        assert reader is not None
        become(program, reader, ours.norm.default, (x, groups, weight, bias, eps, "silu", *FLOAT))


def _activation(program: Program, node: fx.Node) -> None:
    if _is_dense(program, node):
        kind = "silu" if "silu" in name_of(node) else gelu_kind(node)
        become(program, node, ours.map.default, (node.args[0], kind, *FLOAT))


def _geglu(program: Program, node: fx.Node) -> None:
    if (end := geglu_end(program, node)) and _is_dense(program, node.args[0]):
        become(program, end, ours.map.default, (node.args[0], "geglu", *FLOAT))


def _quantize(program: Program, node: fx.Node) -> None:
    x, scale, zero_point, row, low, high = node.args
    if (low, high) == (0, 255) and keeps_batch(program, node):
        become(program, node, ours.map.default, (x, "none", row, scale, zero_point, "u8"))


def _add(program: Program, node: fx.Node) -> None:
    a, b = node.args[:2]
    if node.kwargs or not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or not _is_dense(program, node):
        return
    if program.types[a.name] == program.types[b.name] == program.types[node.name]:
        become(program, node, ours.gated_add.default, (a, None, b, *FLOAT))


def _is_dense(program: Program, node: Any) -> bool:
    """True for f32 [B, ...] of several dimensions: what waits for the sample, and not for rows alone."""
    type_ = program.tensor_type(node)
    return type_ is not None and type_.dtype is torch.float32 and len(type_.shape) > 2 and keeps_batch(program, node)


_REWRITES: dict[str, Callable[[Program, fx.Node], None]] = {
    "aten.group_norm.default": _norm,
    "aten.layer_norm.default": _norm,
    "tfqc.group_norm_rows.default": _norm,
    "tfqc.layer_norm_rows.default": _norm,
    "aten.silu.default": _activation,
    "aten.gelu.default": _activation,
    "aten.chunk.default": _geglu,
    "tfqc.quantize.default": _quantize,
    "aten.add.Tensor": _add,
}
