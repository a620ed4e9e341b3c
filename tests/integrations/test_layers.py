"""Layers that hold int8 codes compute what those that they replace do with the weights that codes stand for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tfqc.integrations.diffusers.layers import Int8Layer, replace_layers, restored

LAYERS = {
    "linear": (nn.Linear(6, 8), (2, 3, 6)),
    "conv1d": (nn.Conv1d(4, 8, 3, stride=2, padding=2, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 8, 3, padding="same", padding_mode="circular"), (2, 4, 6, 5)),
    "conv3d": (nn.Conv3d(4, 8, (1, 2, 2), stride=(1, 2, 2), bias=False), (2, 4, 3, 6, 4)),
}


class Model(nn.Module):
    dtype = torch.float32

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, dtype: torch.dtype) -> None:
    plain, shape = LAYERS[name]
    torch.manual_seed(0)
    given = torch.randn(shape)
    model = Model(copy.deepcopy(plain))
    assert replace_layers(model, lambda name: True) == 1
    layer: Any = model.layer
    assert isinstance(layer, Int8Layer) and isinstance(layer, type(plain))
    layer.take_weight(plain.weight.detach())
    rounded = layer.weight.float() * layer.weight_scale.reshape(-1, *[1] * (plain.weight.dim() - 1))
    assert layer.weight.dtype == torch.int8
    assert (rounded - plain.weight).abs().amax() <= 0.501 * layer.weight_scale.amax()
    wanted = copy.deepcopy(plain).to(dtype)
    wanted.weight.data = rounded.to(dtype)
    if layer.bias is not None:  # scales keep their dtype
        layer.bias.data = layer.bias.data.to(dtype)
    assert torch.equal(layer(given.to(dtype)), wanted(given.to(dtype)))
    back: Any = restored(Model(layer)).layer
    assert type(back) is type(plain) and torch.equal(back.weight, rounded)
