"""A batch norm behind a layer, in eval mode, is part of it: its scale goes into the weight, its shift into the bias.

norm(x) = (x - mean) * s + beta, s = gamma / sqrt(var + eps);  norm(W x + b) = (s W) x + s (b - mean) + beta
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from tfqc.analysis.weighted import QUANTIZED, WEIGHTED
from tfqc.ir.edit import Rewriter, Rule
from tfqc.ir.match import call, is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import stored_in

aten = torch.ops.aten
_LAYERS = call(*QUANTIZED, name="layer", once=True)


def batch_norm_rules() -> list[Rule]:
    """Rules that fold batch norms into the layers whose results they alone read."""
    norm = call(aten.batch_norm.default, input=_LAYERS, training=False)
    return [Rule(norm, _fold)]


def has_batch_norms(program: Program) -> bool:
    """True if there may be something to fold."""
    return any(node.target is aten.batch_norm.default for node in program.step.nodes)


def _fold(edit: Rewriter, node: fx.Node, layer: fx.Node) -> bool:
    program, its = edit.program, WEIGHTED[layer.target]
    weight, bias = stored_in(layer.kwargs[its.weight]), layer.kwargs[its.bias]
    given = {name: node.kwargs[name] for name in ("weight", "bias", "running_mean", "running_var")}
    rank = len(program.tensor_type(layer).shape)  # type: ignore[union-attr]
    if weight is None or not all(v is None or is_stored(v) for v in (bias, *given.values())):
        return False
    if rank != 2 + its.windows:  # a linear of sequences has its channels last
        return False
    values: dict[str, Tensor | None] = {
        name: None if value is None else program.tensors[str(value.target)]  # type: ignore[union-attr]
        for name, value in {**given, "own": bias}.items()
    }
    mean, var = values["running_mean"], values["running_var"]
    if mean is None or var is None:
        return False
    eps: Any = node.kwargs["eps"]
    scale = torch.rsqrt(var.double() + eps) * (1.0 if values["weight"] is None else values["weight"].double())
    own = 0.0 if values["own"] is None else values["own"].double()
    shift = (own - mean.double()) * scale + (0.0 if values["bias"] is None else values["bias"].double())
    matrix = program.tensors[weight]
    wide = (matrix.double() * scale.reshape(-1, *[1] * (matrix.dim() - 1))).float()
    folded = program.add_tensors(weight, {"normed": wide, "shift": shift.float()})
    operands = {its.weight: program.tensor_node(folded[0]), its.bias: program.tensor_node(folded[1])}
    edit.update(layer, **operands)
    edit.replace(node, layer)
    return True
