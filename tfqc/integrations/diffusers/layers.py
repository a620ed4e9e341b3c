"""Layers whose weights are int8 codes: to others they are linear layers and convolutions, and called like these."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tfqc.quant.grid import Grid, quantize_weight

_GRID = Grid(8, symmetric=True)


class Int8Layer(nn.Module):
    """What both kinds share.

    weight: codes, int8 in the shape of the layer's weight. weight_scale: [O] f32; a weight is code * scale. What is
    computed is computed in the dtype of the input.
    """

    weight: Any
    weight_scale: Tensor
    bias: Any

    def take_codes(self, codes: Tensor) -> None:
        """Codes as they were stored."""
        self.weight = nn.Parameter(codes, requires_grad=False)

    def take_scale(self, scale: Tensor) -> None:
        """Scales as they were stored."""
        self.weight_scale = scale

    def take_weight(self, weight: Tensor) -> None:
        """Quantize a weight [O, ...] to nearest, min-max, one scale for each output.

        Raises:
            TfqcError: it holds NaN or infinity.
        """
        made = quantize_weight(weight, _GRID)
        self.take_codes(made.q)
        self.take_scale(made.scale[:, 0])

    def values(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for."""
        scale = self.weight_scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        return (self.weight.float() * scale).to(dtype)


class Int8Linear(Int8Layer, nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in_features] -> [..., out_features]."""
        return nn.functional.linear(input, self.values(input.dtype), self.bias)


class Int8Conv1d(Int8Layer, nn.Conv1d):
    """A convolution of a sequence."""

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, L]."""
        return self._conv_forward(input, self.values(input.dtype), self.bias)


class Int8Conv2d(Int8Layer, nn.Conv2d):
    """A convolution of an image."""

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, H, W]."""
        return self._conv_forward(input, self.values(input.dtype), self.bias)


class Int8Conv3d(Int8Layer, nn.Conv3d):
    """A convolution of a video."""

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, F, H, W]."""
        return self._conv_forward(input, self.values(input.dtype), self.bias)


_KINDS: dict[type[nn.Module], type[Int8Layer]] = {
    nn.Linear: Int8Linear, nn.Conv1d: Int8Conv1d, nn.Conv2d: Int8Conv2d, nn.Conv3d: Int8Conv3d,
}  # fmt: skip


def replace_layers(model: nn.Module, wanted: Callable[[str], bool]) -> int:
    """Replace a model's linear layers and convolutions by int8 ones without values; how many is returned.

    The model may lie on the meta device. Layers of classes that were derived from these stay as they are: what they
    compute is their own.

    Args:
        wanted: by the layer's full name.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) in _KINDS and wanted(name)]
    for name, module in found:
        _set(model, name, _as(_KINDS[type(module)], module))
    return len(found)


def restore_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Turn int8 layers into what they were, with the weights that their codes stand for."""
    plain = {made: own for own, made in _KINDS.items()}
    for name, module in [(name, module) for name, module in model.named_modules() if type(module) in plain]:
        assert isinstance(module, Int8Layer)
        made = _as(plain[type(module)], module)  # pyright: ignore[reportArgumentType]
        made.weight = nn.Parameter(module.values(dtype))
        del made._buffers["weight_scale"]
        _set(model, name, made)


def restored(model: Any) -> Any:
    """A model of diffusers without int8 layers: itself if it has none, else a copy that shares all other tensors."""
    if not any(isinstance(module, Int8Layer) for module in model.modules()):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    made = copy.deepcopy(model, shared)
    restore_layers(made, model.dtype)
    return made


def _as(kind: type[Any], module: Any) -> Any:
    """Another layer with a layer's settings and bias; its weight is empty."""
    made: Any = nn.Module.__new__(kind)
    made.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    if issubclass(kind, Int8Layer):
        codes = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
        made.weight = nn.Parameter(codes, requires_grad=False)
        made.register_buffer("weight_scale", torch.empty(len(codes), device="meta"))
    return made


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
