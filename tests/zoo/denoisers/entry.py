"""What is known of one denoiser class: a small configuration, and calls as its pipeline makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

THOUSANDS = (951.0, 701.0, 421.0, 37.0)
FRACTIONS = tuple(t / 1000 for t in THOUSANDS)


class Draw:
    """Noise of the shapes that are asked for, each drawn anew from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self._generator)


# (noise, images, timesteps [images]) -> keyword arguments of a call
Inputs = Callable[[Draw, int, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Denoiser:
    """How a small model of a class is made and called.

    config: of the constructor. inputs: a call. times: timesteps of a schedule, in the order in which they are visited,
    None for a model that is told no time. roles: of inputs whose names do not tell them. draws: calls of two images
    that it is calibrated on at each timestep; more where an image holds few numbers, whose largest are rare.
    """

    config: Mapping[str, Any]
    inputs: Inputs
    times: tuple[float, ...] | None = THOUSANDS
    roles: Mapping[str, str] | None = None
    draws: int = 8

    def call(self, images: int, t: float = 0.0, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments for a batch at one timestep."""
        dtype = torch.int64 if self.times == THOUSANDS else torch.float32
        return self.inputs(Draw(seed), images, torch.full((images,), t).to(dtype))

    def model(self, class_name: str) -> nn.Module:
        """A model with random weights in every parameter, also where the class begins with zeros, or with nothing."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            torch.use_deterministic_algorithms(True)  # memory that nobody has written to holds NaN
            try:
                model = getattr(diffusers, class_name)(**self.config).eval()
            finally:
                torch.use_deterministic_algorithms(False)
            for parameter in model.parameters():
                if not bool(torch.isfinite(parameter).all()):
                    nn.init.normal_(parameter, std=parameter.shape[-2:][0] ** -0.5)
                if parameter.dim() < 2 or not bool(parameter.any()):
                    parameter.data += 0.1 * torch.randn_like(parameter)
        return model.requires_grad_(False)


def grid(*sizes: int) -> Tensor:
    """Positions in a grid, a row for each of them: [product of sizes, number of sizes], f32."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes)).float()


def ones(*shape: int) -> Tensor:
    """A mask that masks nothing but the end of each image's text."""
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, -2:] = False
    return mask
