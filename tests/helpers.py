"""What tests share beside fixtures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from tfqc.instruments import CheckNumerics, VerifyEach
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import BindingTime, Tib
from tfqc.passing import Context, Pass
from tfqc.passing.pipeline import Pipeline


def run_pass(program: Program, item: Pass, ctx: Context | None = None) -> Program:
    """Run one pass in place, verified before and after, its outputs held to the numerics that it declares."""
    return Pipeline((item,)).run(program, ctx, [VerifyEach(), CheckNumerics()])


def first(result: Any) -> Tensor:
    """The one tensor that a denoiser returns, from any of the ways in which they return it."""
    result = result[0] if isinstance(result, tuple) else getattr(result, "sample", result)
    assert isinstance(result, Tensor)
    return result


def with_batch(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Example inputs of batch 2, with another batch; neighbouring entries differ, timesteps too."""

    def resize(value: Tensor) -> Tensor:
        if value.dim() == 0 or value.shape[0] != 2:
            return value
        return torch.cat([value, value.flip(0)]).repeat(batch, *[1] * (value.dim() - 1))[:batch]

    return pytree.tree_map_only(Tensor, resize, dict(inputs))


def features(program: Program) -> list[fx.Node]:
    """Nodes that discover-tib found to be temporal features, in order."""
    rows = program.table(Tib)
    return [n for n in program.step.nodes if n.name in rows and rows[n.name].part == "feature"]


def roles_of(program: Program, node: fx.Node) -> set[Role]:
    """The binding time that discover-tib gave a node."""
    row = program.table(BindingTime).get(node.name)
    return {Role.SAMPLE} if row is None else {Role(r) for r in row.roles}


def evaluate_nodes(program: Program, nodes: list[fx.Node], inputs: Mapping[str, Any]) -> list[Tensor]:
    """Values of nodes of @step in a call with `inputs` (of captured types, by path)."""
    probe = program.clone()
    by_name = {n.name: n for n in probe.step.nodes}
    output = next(n for n in probe.step.nodes if n.op == "output")
    output.args = (tuple(by_name[n.name] for n in nodes),)
    return list(probe(**inputs))


def find(program: Program, op: str) -> list[fx.Node]:
    """Nodes of @step that call an operation, by a part of its name."""
    return [n for n in program.step.nodes if n.op == "call_function" and op in str(n.target)]


def name_of(node: Any) -> str:
    """The operation of a node, as IR text names it; empty for whatever is none."""
    return op_name(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else ""


def args_of(node: Any) -> tuple[Any, ...]:
    """Operands of a call in the order of its schema, defaults too."""
    return tuple(node.args) or tuple(node.kwargs.values())
