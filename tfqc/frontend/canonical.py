"""Products with stored weights, in the forms that are quantized: `linear` and convolutions padded by numbers.

Exact: the same numbers are multiplied and summed. Products that have no such form stay as they are, and
`tfqc.analysis.left` names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfqc.ir.edit import Rewriter, Rule
from tfqc.ir.match import call, capture, is_call, is_stored
from tfqc.ir.program import Program
from tfqc.ir.views import PaddedConv, stored_in

aten = torch.ops.aten
_TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default)
_PADDED_BY_NUMBERS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def canonical_rules() -> list[Rule]:
    """Rules for one program: they remember which matrices were transposed for it."""
    transposed: dict[str, str] = {}

    def product(edit: Rewriter, node: fx.Node, x: Any, matrix: Any, bias: Any = None) -> bool:
        return _as_linear(edit, node, x, matrix, bias, transposed)

    return [
        Rule(call(aten.mm.default, self=capture("x"), mat2=capture("matrix")), product),
        Rule(call(aten.matmul.default, self=capture("x"), other=capture("matrix")), product),
        Rule(
            call(
                aten.addmm.default,
                self=capture("bias", is_stored),
                mat1=capture("x"),
                mat2=capture("matrix"),
                beta=1,
                alpha=1,
            ),
            product,
        ),
        Rule(call(*_PADDED_BY_NUMBERS), _by_numbers),
    ]


def _as_linear(
    edit: Rewriter, node: fx.Node, x: Any, matrix: Any, bias: fx.Node | None, transposed: dict[str, str]
) -> bool:
    """x @ matrix (+ bias) as a linear layer, whose weight is the matrix transposed."""
    program = edit.program
    type_ = program.tensor_type(x)
    found = _stored(program, matrix)
    if type_ is None or len(type_.shape) < 2 or found is None or _stored(program, x) is not None:
        return False
    name, is_transposed = found
    own = program.tensors[name]
    if bias is not None and program.tensors[str(bias.target)].shape != (own.shape[not is_transposed],):
        return False
    if not is_transposed and name not in transposed:  # a view, so that its product is computed as the model does
        transposed[name] = program.add_tensor(f"{name}.transposed", own.t())
    weight = edit.read(node, name if is_transposed else transposed[name])
    edit.become(node, aten.linear.default, input=x, weight=weight, bias=bias)
    return True


def _stored(program: Program, value: Any) -> tuple[str, bool] | None:
    """The stored matrix that a value is, and whether it is transposed on the way; None for any other value."""
    transposed = False
    while is_call(value, *_TRANSPOSES):
        if (swaps := _swaps(value)) is None:
            return None
        transposed ^= swaps
        value = value.kwargs["self"]
    name = stored_in(value)
    return (name, transposed) if name is not None and program.tensors[name].dim() == 2 else None


def _swaps(node: fx.Node) -> bool | None:
    """Whether a transposition of a matrix swaps its dimensions; None if it is none of two dimensions."""
    if is_call(node, aten.transpose.int):
        dims: Any = [node.kwargs["dim0"], node.kwargs["dim1"]]
    elif is_call(node, aten.permute.default):
        dims = node.kwargs["dims"]
    else:
        return True
    order = [int(d) % 2 for d in dims]
    if set(order) != {0, 1} or len(order) != 2:
        return None
    return is_call(node, aten.transpose.int) or order == [1, 0]


def _by_numbers(edit: Rewriter, node: fx.Node) -> bool:
    """`padding="same"` and "valid" as numbers; what is odd stands at the right, in a padding of its own."""
    conv = PaddedConv(node)
    kernel = edit.program.tensor_type(conv.weight)
    if kernel is None or not all(isinstance(size, int) for size in kernel.shape[2:]):
        return False
    windows: Any = kernel.shape[2:]
    dilation = list(conv.dilation) * (len(windows) // len(conv.dilation))
    steps = [d * (k - 1) if conv.padding == "same" else 0 for d, k in zip(dilation, windows, strict=True)]
    x = conv.input
    if any(step % 2 for step in steps):
        sides = [side for step in reversed(steps) for side in (step // 2, step - step // 2)]
        x = edit.insert(node, aten.constant_pad_nd.default, x, sides, 0.0, like=node)
        steps = [0] * len(windows)
    operands = {**node.kwargs, "input": x, "padding": [step // 2 for step in steps], "dilation": dilation}
    edit.become(node, _PADDED_BY_NUMBERS[node.target], **operands)
    return True
