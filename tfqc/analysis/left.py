"""Products with stored weights that no pass quantizes, for the report; and programs of which nothing is quantized."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from tfqc.analysis.weighted import WEIGHTED, left_weights
from tfqc.errors import TfqcError
from tfqc.ir.match import is_call
from tfqc.ir.ops import op_name
from tfqc.ir.program import TIME, Program

ours = torch.ops.tfqc
_SIGNS = (
    ours.quantize.default, ours.quantize_dynamic.default, ours.quantize_tokens.default, ours.dequantize_weight.default,
    ours.dequantize_weight_int4.default, ours.qlinear.default, ours.qconv.default,
)  # fmt: skip


def left_in_floating_point(program: Program) -> list[tuple[fx.Node, str]]:
    """Each operation with a stored weight that is not quantized, and the weight's name."""
    return [
        (node, weights[0])
        for function in program.functions
        for node in (program.nodes(function) if function != TIME else ())
        if (weights := left_weights(program, node))
    ]


def check_quantized(program: Program) -> None:
    """Refuse a program in which passes were to quantize and did not find anything.

    Raises:
        TfqcError: what was found instead.
    """
    nodes = [n for f in program.functions for n in program.nodes(f)]
    if any(is_call(n, *_SIGNS) for n in nodes):
        return
    found = Counter(op_name(n.target) for n in nodes if is_call(n, *WEIGHTED))
    what = ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "no product at all"
    raise TfqcError(
        f"Nothing of {program.model} was quantized: beside the block of the timestep it has no linear layer and no "
        f"convolution with a stored weight (found: {what}). Write its layers with nn.Linear or nn.Conv2d, or ask for "
        "none with weights=none activations=none."
    )
