"""A denoiser that has what branches meet: an image's convolutions with the time in their bias, an affine that time
gives, attention, keys of a request, GEGLU, residual sums, a concatenation, and layers of the time itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tfqc
from tfqc.adapters import LowRank
from tfqc.codegen.reading import read_program
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.runtime.ops import dequantize_weight

TIMES = [900.0, 500.0, 100.0]
TEMPORAL = ("time1", "time2", "shift", "affine")


class Small(nn.Module):
    """sample [B, 4, 4, 4], timestep [B], encoder_hidden_states [B, 3, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.time1, self.time2 = nn.Linear(1, 32), nn.Linear(32, 32)
        self.shift, self.affine = nn.Linear(32, 32), nn.Linear(32, 64)
        self.first, self.second = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.group, self.norm = nn.GroupNorm(4, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = nn.Linear(32, 32), nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 32)
        self.wide, self.narrow = nn.Linear(32, 128), nn.Linear(64, 32)
        self.last = nn.Conv2d(64, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        time = self.time2(F.silu(self.time1(timestep.float()[:, None] / 1000)))
        h = self.first(sample) + self.shift(F.silu(time))[:, :, None, None]
        h = h + self.second(F.silu(self.group(h)))
        x = h.flatten(2).transpose(1, 2)
        scale, shift = self.affine(time)[:, None].chunk(2, -1)
        y = self.norm(x) * (1 + scale) + shift
        q, k, v = (
            t.unflatten(-1, (2, 16)).transpose(1, 2)
            for t in (self.q(y), self.k(encoder_hidden_states), self.v(encoder_hidden_states))
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        value, gate = self.wide(x).chunk(2, -1)
        x = x + self.narrow(value * F.gelu(gate))
        return self.last(torch.cat([x.transpose(1, 2).unflatten(-1, (4, 4)), h], 1))


def made() -> Small:
    torch.manual_seed(0)
    return Small().requires_grad_(False).eval()


def inputs(time: float = 500.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.full((2,), time),
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=generator),
    }


def compiled(model: Small, target: str, directory: Path, strategy: str = "fold", **options: Any) -> Path:
    """A saved artifact, by the same pipeline for every target unless `options` are given."""
    pipeline = quantization_pipeline(strategy, **{"weights": 8, "activations": 8, "reconstruct": False, **options})
    calls = [inputs(time) for time in TIMES]
    artifact = tfqc.compile(
        model, target, schedule=TIMES, calibration=calls, pipeline=pipeline, example_inputs=inputs()
    )
    return artifact.save(directory)


def adapters(model: Small, *names: str) -> dict[str, LowRank]:
    """Of rank 2, large enough to matter."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=generator)

    weights = {name: model.get_submodule(name).weight.shape for name in names}
    return {name: LowRank(random(2, *shape[1:]), random(shape[0], 2)) for name, shape in weights.items()}


def merged(model: Small, its: dict[str, LowRank]) -> Small:
    """The model with adapters in its weights."""
    model = copy.deepcopy(model)
    for name, adapter in its.items():
        weight = model.get_submodule(name).weight
        weight += (adapter.up @ adapter.down.flatten(1)).reshape(weight.shape)
    return model


def dequantized(model: Small, directory: Path) -> Small:
    """The model with the weights that codes of a fake-quant artifact stand for."""
    model, tensors = copy.deepcopy(model), read_program(directory).tensors
    for name, layer in model.named_children():
        if f"{name}.weight.codes" in tensors:
            codes, scale, zero = (tensors[f"{name}.weight.{part}"] for part in ("codes", "scale", "zero_point"))
            layer.weight = nn.Parameter(dequantize_weight(codes, scale, zero, codes[0].numel()), False)
    return model


LAYERS = [name for name, layer in made().named_children() if isinstance(layer, (nn.Linear, nn.Conv2d))]
