"""Which quantized operations CUDA kernels multiply on tensor cores, and why the others run in torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from tfqc.analysis.rewrite import keeps_batch, name_of
from tfqc.analysis.weighted import WEIGHTED
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.ir.rows import RowSource
from tfqc.lowering.windows import window_of
from tfqc.runtime.kernel_ops import GROUP

# Products that hold a weight and have no kernel: what is no linear and no convolution of images or rows.
_OTHER_PRODUCTS = {
    "aten.conv3d.default", "aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.addmm.default",
    "aten.conv_transpose3d.input", "aten.convolution.default", "aten.mm.default", "aten.einsum.default",
    "aten.baddbmm.default", "aten.conv2d.padding", "aten.conv1d.padding", "aten.conv3d.padding",
}  # fmt: skip
_WEIGHT, _INPUT = "int4{per=channel}", "int4 or int8"
LONGEST = 65_536  # codes of a row of the input: s32 holds any sum of so many products


def why_not_tensor_cores(program: Program, node: fx.Node) -> str:
    """Why kernels do not run a linear or convolution of @step whose weight is quantized; empty if they do."""
    return _on_tensor_cores(program, node).because


def support_of(program: Program, node: fx.Node) -> Support:
    """Whether kernels run a product with a stored weight, or torch; `YES` for what is no such product.

    Kernels' own products have other names than those of ATen; a branch of low rank is to be a product in f16.
    """
    name = name_of(node)
    if name in WEIGHTED:
        found = _on_tensor_cores(program, node)
    else:
        stored = name in _OTHER_PRODUCTS and any(_is_stored(n) for n in node.all_input_nodes)
        found = Support(True, f"there is no kernel for {name}" if stored else "")
    return replace(found, because=f"runs in torch: {found.because}") if found.because else YES


def _on_tensor_cores(program: Program, node: fx.Node) -> Support:
    read, weight = (_before_casts(n) for n in node.args[:2])
    if name_of(weight) != "tfqc.dequantize_weight_int4.default":
        stored = name_of(weight) == "tfqc.dequantize_weight.default"
        why = "its weight has more than 4 bits" if stored else "its weight is in floating point"
        return Support(True, why, "weight", _WEIGHT)
    assert isinstance(weight, fx.Node) and isinstance(read, fx.Node)
    if why := _of_shape(program, node, weight):
        return Support(True, why)
    if why := _of_weight(program, node, weight):
        return Support(True, why, "weight", _WEIGHT)
    if why := _of_bias(program, node):
        return Support(True, why)
    why = _of_input(program, node, read)
    return Support(True, why, "input", _INPUT) if why else YES


def _is_stored(value: fx.Node) -> bool:
    """True for a tensor of the model, also where it was cast or turned."""
    while value.op == "call_function" and len(value.all_input_nodes) == 1:
        (value,) = value.all_input_nodes
    return value.op == "get_attr"


def is_step_row(program: Program, value: Any) -> bool:
    """True for a read of a table at the row of the timestep, which is the same for all of a launch."""
    if name_of(value) != "tfqc.table_read.default":
        return False
    source = program.table(RowSource).get(value.args[1].name)
    return source is not None and source.kind == "row" and not source.label


def _before_casts(value: Any) -> Any:
    while name_of(value) == "aten.to.dtype":
        value = value.args[0]
    return value


def _of_shape(program: Program, node: fx.Node, weight: fx.Node) -> str:
    type_ = program.tensor_type(weight)
    assert type_ is not None
    if name_of(node) == "aten.linear.default":
        return ""
    if name_of(node) == "aten.conv1d.default":
        return "it is a convolution in one dimension"
    stride, padding, dilation, groups = (*node.args[3:7], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:7]) :])
    if groups != 1 or set(dilation) != {1}:  # type: ignore[arg-type]
        return "it has groups or a dilation"
    window, strides = tuple(type_.shape[2:]), tuple(stride)  # type: ignore[arg-type]
    pads = padding if isinstance(padding, str) else tuple(padding)  # type: ignore[arg-type]
    if window == strides == (1, 1) and pads in ((0, 0), "same", "valid"):
        return ""
    if window != (3, 3) or strides not in ((1, 1), (2, 2)) or pads != (1, 1):
        return f"its window is {window[0]} x {window[1]} with stride {strides[0]} and padding {pads}"
    sized = window_of(program, node) is not None
    return "" if sized else "the height and width of its input are not known when it is compiled"


def _of_weight(program: Program, node: fx.Node, weight: fx.Node) -> str:
    scale, zero_point, group = weight.args[1:4]
    assert isinstance(scale, fx.Node) and isinstance(zero_point, fx.Node)
    zero, type_ = program.tensors[str(zero_point.target)], program.tensor_type(weight)
    assert type_ is not None
    if program.tensors[str(scale.target)].shape[1] != 1 and (group != GROUP or window_of(program, node) is not None):
        return f"its weight has a scale for each {group} columns: kernels take {GROUP}, of linears and windows of 1 x 1"
    taps = 9 if window_of(program, node) is not None else 1
    channels = type_.shape[1]
    assert isinstance(channels, int)
    if -(-channels // 32) * 32 * taps > LONGEST:
        return "its sums do not fit into 32 bits"
    return "its weight's zero points are not 0" if not zero.is_meta and bool(zero.any()) else ""


def _of_bias(program: Program, node: fx.Node) -> str:
    bias = node.args[2] if len(node.args) > 2 else None
    constant = bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")
    return "" if constant or is_step_row(program, bias) else "its bias is computed at run time"


def _of_input(program: Program, node: fx.Node, read: fx.Node) -> str:
    if not keeps_batch(program, read):
        return "the first dimension of its input is not the batch"
    if name_of(read) == "tfqc.quantize_dynamic.default":
        return "" if read.args[1] in (4, 8) else f"its input has {read.args[1]} bits"
    if name_of(read) != "tfqc.dequantize.default":
        return ""  # f16
    codes = read.args[0]
    if name_of(codes) != "tfqc.quantize.default":
        return "its input's codes are not computed here"
    assert isinstance(codes, fx.Node)
    low, high = codes.args[4:]
    return "" if (low, high) in ((0, 15), (0, 255)) else f"its input's codes lie in {low}..{high}"
