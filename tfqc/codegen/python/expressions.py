"""Operations as the Python that a person would write for them; emitters of `model.py` share it.

`stored` says how a value that is not computed here is written: the text for a node, or None for a variable.
"""

from __future__ import annotations

import builtins
import json
import keyword
import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx

from tfqc.codegen.python.fused import is_fused_dequantize
from tfqc.ir.calls import written
from tfqc.ir.match import is_call, returned_value
from tfqc.ir.ops import op_name, signature
from tfqc.ir.views import Dequantize
from tfqc.runtime import kernel_ops, ops

# What is made of nothing is made where the inputs are, wherever the model was captured; `bodies.body` defines it.
DEVICE = "device_of_inputs"

Stored = Callable[[fx.Node], str | None]

aten = torch.ops.aten
_FUNCTIONS: dict[Any, str] = {
    aten.linear.default: "F.linear", aten.conv2d.default: "F.conv2d", aten.silu.default: "F.silu",
    aten.gelu.default: "F.gelu", aten.layer_norm.default: "F.layer_norm", aten.group_norm.default: "F.group_norm",
    aten.scaled_dot_product_attention.default: "F.scaled_dot_product_attention", aten.cat.default: "torch.cat",
    aten.stack.default: "torch.stack", aten.sin.default: "torch.sin", aten.cos.default: "torch.cos",
    aten.exp.default: "torch.exp",
}  # fmt: skip
_METHODS: dict[Any, str] = {
    aten.reshape.default: "reshape", aten.view.default: "view", aten.permute.default: "permute",
    aten.transpose.int: "transpose", aten.unsqueeze.default: "unsqueeze", aten.expand.default: "expand",
    aten.chunk.default: "chunk", aten.to.dtype: "to", aten.flatten.using_ints: "flatten",
}  # fmt: skip
_INFIX: dict[Any, str] = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/", operator.add: "+",
    operator.mul: "*", operator.sub: "-", operator.floordiv: "//", operator.truediv: "/", operator.mod: "%",
    operator.pow: "**", operator.eq: "==", operator.ne: "!=", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_PREFIX: dict[Any, str] = {operator.neg: "-", operator.pos: "+", operator.not_: "not "}
# Operands of ATen that functions of torch do not have: they say which library computes the same.
_NOT_OF_TORCH = ("cudnn_enable", "cudnn_enabled")


# What the generated functions call: a value of such a name would hide it from them.
_CALLED = {"self", "torch", "aten", "F", "fake_quantize", *vars(ops), *vars(kernel_ops), *vars(builtins)}


def variable(node: fx.Node) -> str:
    """The Python name of a node's value. Parameters keep theirs, by which they are called."""
    hides = keyword.iskeyword(node.name) or (node.op == "call_function" and node.name in _CALLED)
    return f"{node.name}_value" if hides else node.name


def expression(node: fx.Node, stored: Stored) -> str:
    """The right-hand side of a node's line."""
    if node.op == "output":
        return value(returned_value(node), stored)
    if is_fused_dequantize(node):
        return f"fake_quantize({arguments(Dequantize(node).codes, stored)})"
    args, kwargs = written(node)
    if is_call(node, operator.getitem):
        return f"{value(args[0], stored)}[{value(args[1], stored)}]"
    if is_call(node, aten.sym_size.int):
        return f"{value(args[0], stored)}.shape[{value(args[1], stored)}]"
    if is_call(node, *_INFIX) and len(args) == 2 and not kwargs:
        return f"{value(args[0], stored)} {_INFIX[node.target]} {value(args[1], stored)}"
    if is_call(node, *_PREFIX):
        return f"{_PREFIX[node.target]}{value(args[0], stored)}"
    if is_call(node, operator.abs):
        return f"abs({value(args[0], stored)})"
    if is_call(node, *_METHODS) and not kwargs:
        return f"{value(args[0], stored)}.{_METHODS[node.target]}({', '.join(value(a, stored) for a in args[1:])})"
    name = op_name(node.target)
    if name.startswith("tfqc."):
        return f"{name.split('.')[1]}({arguments(node, stored)})"
    if is_call(node, *_FUNCTIONS):
        return f"{_FUNCTIONS[node.target]}({arguments(node, stored, without=_NOT_OF_TORCH)})"
    return f"{name}({arguments(node, stored)})"


def arguments(node: fx.Node, stored: Stored, by_name: bool = False, without: Collection[str] = ()) -> str:
    """Operands of a call, without those that are as usual; all but the first by their names, if so wanted."""
    args, kwargs = written(node)
    if without:
        names = [operand.name for operand in signature(node.target)]
        args = [value for name, value in zip(names, args, strict=False) if name not in without]
        kwargs = {name: value for name, value in kwargs.items() if name not in without}
    if by_name and args:
        names = [operand.name for operand in signature(node.target)]
        kwargs = dict(zip(names[1:], args[1:], strict=False)) | kwargs
        args = args[:1]
    named = [f"{key}={value(item, stored)}" for key, item in kwargs.items()]
    return ", ".join([*(value(a, stored) for a in args), *named])


def value(item: Any, stored: Stored) -> str:
    """A literal, a variable, or a buffer of the module, as Python."""
    match item:
        case fx.Node():
            return stored(item) or variable(item)
        case list():
            return f"[{', '.join(value(i, stored) for i in item)}]"
        case tuple():
            return f"({', '.join(value(i, stored) for i in item)}{',' if len(item) == 1 else ''})"
        case dict():
            return f"{{{', '.join(f'{k!r}: {value(v, stored)}' for k, v in item.items())}}}"
        case str():
            return json.dumps(item)
        case float() if not math.isfinite(item):
            return f'float("{item}")'
        case torch.device():
            return DEVICE
        case slice():
            return f"slice({value(item.start, stored)}, {value(item.stop, stored)}, {value(item.step, stored)})"
        case _:
            return repr(item)
