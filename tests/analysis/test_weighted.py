"""Products with weights of the model, however far their other operand has come."""

from __future__ import annotations

import torch
from torch import fx

from tfqc.analysis.weighted import multiplies_stored

aten, ours = torch.ops.aten, torch.ops.tfqc


def test_products_with_weights() -> None:
    graph = fx.Graph()
    x = value = graph.placeholder("x")
    for _ in range(5000):  # deeper than Python calls itself
        value = graph.call_function(aten.relu.default, (value,))
    codes, scale, zero = (graph.get_attr(name) for name in ("codes", "scale", "zero"))
    weight = graph.call_function(ours.dequantize_weight.default, (codes, scale, zero))
    half = graph.call_function(aten.to.dtype, (weight, torch.float16))
    for stored, product in (
        (True, graph.call_function(aten.linear.default, (value, half))),
        (True, graph.call_function(aten.conv2d.default, (value, codes))),
        (False, graph.call_function(aten.matmul.default, (value, value))),
        (False, graph.call_function(aten.linear.default, (x, value))),
        (False, graph.call_function(aten.embedding.default, (codes, x))),
        (False, graph.call_function(aten.add.Tensor, (value, scale))),
    ):
        assert multiplies_stored(product) is stored
