"""Models as users name them on the command line: `tests.cli.factories:unet`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from tests.models import MODELS, unet2d
from tests.tiny import INPUTS, Tiny
from tfqc.models.spec import ModelSpec


def _seeded(model: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model().eval().requires_grad_(False)


def tiny() -> ModelSpec:
    """A dozen operations and a scheduler: the cheapest model that compiles."""
    return ModelSpec("tiny", _seeded(Tiny), INPUTS, DDIMScheduler())


def unet() -> ModelSpec:
    """A small UNet of diffusers, without decoder or classes."""
    model, inputs = unet2d()
    return ModelSpec("small-unet", model, inputs, DDIMScheduler())


def no_scheduler() -> tuple[nn.Module, dict[str, Any]]:
    """A model that comes without a scheduler."""
    return _seeded(Tiny), dict(INPUTS)


def nan_weights() -> ModelSpec:
    """A weight is NaN."""
    spec = tiny()
    spec.model.get_parameter("conv_out.weight").data[0, 0, 0, 0] = torch.nan
    return spec


class Timeless(nn.Module):
    """A convolution that asks for no timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, sample: Tensor, condition: Tensor) -> Tensor:
        """Anything."""
        return self.conv(sample) + condition


def timeless() -> tuple[nn.Module, dict[str, Any]]:
    """A model without a time input."""
    return _seeded(Timeless), {"sample": torch.zeros(2, 2, 4, 4), "condition": torch.zeros(2, 2, 4, 4)}


class Branching(Tiny):
    """Asks its data which way to go."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Not exportable."""
        if sample.sum() > 0:  # the line that the message names
            return sample
        return super().forward(sample, timestep)


def branching() -> ModelSpec:
    """A model that torch.export refuses."""
    return ModelSpec("branching", _seeded(Branching), INPUTS, DDIMScheduler())


def strange() -> str:
    """No model."""
    return "a string"


def dit() -> ModelSpec:
    """A transformer of diffusers: other input names, class labels, one timestep an image."""
    model, inputs = MODELS["dit"]()
    return ModelSpec("small-dit", model, inputs, DDIMScheduler())


class Nested(Tiny):
    """Conditions in a dictionary: some of them for each image, one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(3, 2)

    def forward(self, sample: Tensor, timestep: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Shifts the sample."""
        shift = self.text(conditions["text"]) * conditions["strength"]
        return super().forward(sample + shift[:, :, None, None], timestep)


def nested() -> ModelSpec:
    """A small model with nested request inputs."""
    conditions = {"text": torch.linspace(-1, 1, 6).reshape(2, 3), "strength": torch.tensor([0.5])}
    return ModelSpec("nested", _seeded(Nested), {**INPUTS, "conditions": conditions}, DDIMScheduler())


def sdxl() -> ModelSpec:
    """A UNet with nested request inputs."""
    model, inputs = MODELS["unet-sdxl"]()
    return ModelSpec("small-sdxl", model, inputs, DDIMScheduler())


def shifted() -> ModelSpec:
    """A scheduler of flow matching that its user has set, shifted by the size of an image."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(3, mu=0.8)
    return ModelSpec("shifted", _seeded(Tiny), INPUTS, scheduler)


class Straight:
    """A scheduler that diffusers does not have: flow times from 0 to 1."""

    timesteps: tuple[float, ...] = ()

    def set_timesteps(self, steps: int) -> None:
        """Evenly."""
        self.timesteps = tuple(1000 * i / steps for i in range(steps))

    def step(self, output: Tensor, t: float, sample: Tensor) -> Tensor:
        """Straight on."""
        return sample + output / len(self.timesteps)


def straight() -> ModelSpec:
    """A scheduler of one's own."""
    return ModelSpec("straight", _seeded(Tiny), INPUTS, Straight())
