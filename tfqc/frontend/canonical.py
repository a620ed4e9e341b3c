"""Products with stored weights, in the two forms that are quantized: `aten.linear` and `aten.conv2d`.

Exact: the same numbers are multiplied and summed. Products that have no such form stay as they are, and
`tfqc.analysis.left` names them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tfqc.ir.ops import op_name
from tfqc.ir.program import Program

_TRANSPOSED = {
    "aten.t.default": None, "aten.numpy_T.default": None, "aten.transpose.int": {0, 1}, "aten.permute.default": {0, 1},
}  # fmt: skip


def make_canonical(program: Program, node: fx.Node, transposed: dict[str, str]) -> None:
    """Rewrite a `call_function` node of @step in place, if it is such a product in another form.

    transposed: names of matrices that were transposed for it so far, by those of the model's own.
    """
    match op_name(node.target):
        case "aten.mm.default" | "aten.matmul.default":
            x, matrix = node.args
            _as_linear(program, node, x, matrix, None, transposed)
        case "aten.addmm.default" if not node.kwargs and len(node.args) == 3:
            bias, x, matrix = node.args
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and program.tensors[str(bias.target)].dim() == 1:
                _as_linear(program, node, x, matrix, bias, transposed)
        case "aten.conv2d.padding" if not node.kwargs:
            _with_padding(program, node, torch.ops.aten.conv2d.default, 2)
        case "aten.conv1d.padding" if not node.kwargs:
            _with_padding(program, node, torch.ops.aten.conv1d.default, 1)
        case _:
            pass


def _as_linear(
    program: Program, node: fx.Node, x: Any, matrix: Any, bias: fx.Node | None, transposed: dict[str, str]
) -> None:
    """x @ matrix (+ bias) as a linear layer, whose weight is the matrix transposed."""
    type_ = program.tensor_type(x)
    found = _stored(program, matrix)
    if type_ is None or len(type_.shape) < 2 or found is None or _stored(program, x) is not None:
        return
    name, is_transposed = found
    own = program.tensors[name]
    if bias is not None and program.tensors[str(bias.target)].shape[0] != own.shape[not is_transposed]:
        return
    if not is_transposed and name not in transposed:  # a view, so that its product is computed as the model does
        transposed[name] = program.add_tensor(f"{name}.transposed", own.t())
    weight = program.tensor_node(name if is_transposed else transposed[name])
    node.target, node.args = torch.ops.aten.linear.default, (x, weight, *([bias] if bias else []))


def _stored(program: Program, value: Any) -> tuple[str, bool] | None:
    """The stored matrix that a value is, and whether it is transposed on the way; None for any other value."""
    transposed = False
    while isinstance(value, fx.Node) and value.op == "call_function" and op_name(value.target) in _TRANSPOSED:
        dims = _TRANSPOSED[op_name(value.target)]
        given = value.args[1] if len(value.args) == 2 else value.args[1:]
        if dims is not None and {int(d) % 2 for d in given} != dims:  # type: ignore[union-attr]
            return None
        if op_name(value.target) != "aten.permute.default" or [int(d) % 2 for d in given] == [1, 0]:  # type: ignore[union-attr]
            transposed = not transposed
        value = value.args[0]
    if not (isinstance(value, fx.Node) and value.op == "get_attr"):
        return None
    return (str(value.target), transposed) if program.tensors[str(value.target)].dim() == 2 else None


def _with_padding(program: Program, node: fx.Node, target: Any, rank: int) -> None:
    """`padding="same"` and "valid" as numbers; what is odd stands at the right, in a padding of its own."""
    given: tuple[Any, ...] = (*node.args, *(None, [1] * rank, "valid", [1] * rank, 1)[len(node.args) - 2 :])
    x, weight, bias, stride, padding, dilation, groups = given
    windows: Any = program.tensor_type(weight).shape[2:]  # type: ignore[union-attr]
    dilation = list(dilation) * (rank // len(dilation))
    steps = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, windows, strict=True)]
    if any(step % 2 for step in steps):
        sides = [side for step in reversed(steps) for side in (step // 2, step - step // 2)]
        x = program.insert(node, torch.ops.aten.constant_pad_nd.default, (x, sides, 0.0), like=node)
        steps = [0] * rank
    node.target = target
    node.args = (x, weight, bias, stride, [step // 2 for step in steps], dilation, groups)
