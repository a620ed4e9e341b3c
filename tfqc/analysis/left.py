"""Products with stored weights that no pass quantizes, for the report; and programs of which nothing is quantized."""

from __future__ import annotations

from collections import Counter

from torch import fx

from tfqc.analysis.weighted import PRODUCTS, WEIGHTED
from tfqc.errors import TfqcError
from tfqc.ir.ops import is_view, op_name
from tfqc.ir.program import TIME, Program


def left_in_floating_point(program: Program) -> list[tuple[fx.Node, str]]:
    """Each product with a stored weight that is in no form that is quantized, and the weight's name."""
    found: list[tuple[fx.Node, str]] = []
    for function in program.functions:
        for node in program.nodes(function) if function != TIME else ():
            name = op_name(node.target) if node.op == "call_function" else ""
            if name in PRODUCTS and name not in WEIGHTED and (weights := _weights(program, node)):
                found.append((node, weights[0]))
    return found


def check_quantized(program: Program) -> None:
    """Refuse a program in which passes were to quantize and did not find anything.

    Raises:
        TfqcError: what was found instead.
    """
    names = [op_name(n.target) for f in program.functions for n in program.nodes(f) if n.op == "call_function"]
    if any("quantize" in name or name.startswith(("tfqc.qlinear", "tfqc.qconv")) for name in names):
        return
    found = Counter(name for name in names if name in PRODUCTS)
    what = ", ".join(f"{count} {name}" for name, count in sorted(found.items())) or "no product at all"
    raise TfqcError(
        f"Nothing of {program.model} was quantized: beside the block of the timestep it has no linear layer and no "
        f"convolution with a stored weight (found: {what}). Write its layers with nn.Linear or nn.Conv2d, or ask for "
        "none with weights=none activations=none."
    )


def _weights(program: Program, node: fx.Node) -> list[str]:
    """Stored floating tensors of two dimensions and more that a node reads, itself or a view of them."""
    found: list[str] = []
    for operand in node.all_input_nodes:
        while operand.op == "call_function" and is_view(operand):
            operand = operand.all_input_nodes[0]
        if operand.op == "get_attr" and (tensor := program.tensors[str(operand.target)]).is_floating_point():
            found += [str(operand.target)] if tensor.dim() > 1 else []
    return found
