"""Second moments of the inputs of weighted nodes, H = E[x xᵀ], from calibration trajectories."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tfqc.analysis.weighted import weight_of
from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import trajectories
from tfqc.ir.match import is_call
from tfqc.ir.program import Program
from tfqc.ir.views import Conv
from tfqc.passing.context import Context

aten = torch.ops.aten


def observe_moments(program: Program, nodes: Iterable[fx.Node], ctx: Context, steps: int) -> dict[str, Tensor]:
    """H [K, K] in f64 for each node, over all calibration images at `steps` evenly spread steps of the schedule."""
    assert ctx.schedule is not None and ctx.calibration is not None
    wanted = {node.name: node for node in nodes}
    shapes = {name: program.tensors[weight_of(node) or ""].shape for name, node in wanted.items()}
    moments = {name: torch.zeros(s[1:].numel(), s[1:].numel(), dtype=torch.float64) for name, s in shapes.items()}
    counts = dict.fromkeys(wanted, 0)

    def observe(name: str, value: Tensor) -> None:
        if name in wanted:
            rows = _rows(wanted[name], value, shapes[name])
            moments[name] += (rows.T @ rows).double()
            counts[name] += len(rows)

    total = len(ctx.schedule)
    chosen = {round(i * (total - 1) / max(steps - 1, 1)) for i in range(min(steps, total))}
    run = Simulation(program, program.step, observe=observe)
    calls = (inputs for b in trajectories(program, ctx) for step, inputs in b.calls(program) if step in chosen)
    batches = -(-len(ctx.calibration) // ctx.calibration.batch_size)
    with torch.no_grad():
        for inputs in ctx.progress.track(calls, "measuring second moments", batches * len(chosen)):
            run.call(inputs)
    return {name: moment / max(counts[name], 1) for name, moment in moments.items()}


def has_moments(program: Program, node: fx.Node) -> bool:
    """True for linears and ungrouped 2-d convolutions, whose inputs are rows of K values."""
    if weight_of(node) is None:
        return False
    conv = Conv.of(node)
    return is_call(node, aten.linear.default) or (
        conv is not None and conv.target is aten.conv2d.default and conv.groups == 1
    )


def _rows(node: fx.Node, value: Tensor, shape: torch.Size) -> Tensor:
    """The layer's inputs as rows [N, K], in the order of the flattened weight."""
    if is_call(node, aten.linear.default):
        return value.reshape(-1, value.shape[-1])
    conv = Conv(node)
    columns = F.unfold(value, shape[2:], conv.dilation, conv.padding, conv.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])
