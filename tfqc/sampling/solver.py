"""A scheduler in use: set, stepping through one batch of images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfqc.errors import CalibrationError


class Solver:
    """Calls a scheduler that has been set, with what it takes.

    Attributes:
        timesteps: that it visits.
        scale: of unit noise where it begins (flow matching has none: 1).
    """

    def __init__(self, scheduler: Any, seed: int, images: Sequence[int]) -> None:
        self._scheduler, self._seed, self._images = scheduler, seed % 2**64, images
        self.timesteps: list[Any] = list(scheduler.timesteps)
        self.scale = getattr(scheduler, "init_noise_sigma", 1.0)
        self.learns_variance = "learned" in str(getattr(getattr(scheduler, "config", None), "variance_type", ""))
        takes = inspect.signature(scheduler.step).parameters
        self._options: dict[str, Any] = {"return_dict": False} if "return_dict" in takes else {}
        if "generator" in takes:
            self._options["generator"] = [torch.Generator().manual_seed(self._drawn(i)) for i in images]
        self._done = 0

    def seen(self, x: Tensor, t: Any) -> Tensor:
        """What the model is shown of a latent."""
        scale = getattr(self._scheduler, "scale_model_input", None)
        return x if scale is None else scale(x, t).to(x.dtype)

    def step(self, output: Tensor, t: Any, x: Tensor) -> Tensor:
        """The next latent.

        Raises:
            CalibrationError: the scheduler fails.
        """
        self._done += 1
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self._drawn(self._images[0], self._done))
                made = self._scheduler.step(output, t, x, **self._options)
        except Exception as error:
            why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")[:300]
            raise CalibrationError(
                f"{type(self._scheduler).__name__}.step() fails at timestep {float(t):g}: {why}."
            ) from error
        if not isinstance(made, Tensor):
            made = made[0] if isinstance(made, (tuple, list)) else made.prev_sample
        return made.to(x.dtype)

    def _drawn(self, *of: int) -> int:
        return int(np.random.SeedSequence([self._seed, *of]).generate_state(1, np.uint64)[0] >> 1)


@dataclass(frozen=True)
class Rest:
    """What a model is given beside the latent, behind it along one dimension; not denoised. `dim` 0: nothing."""

    dim: int = 0
    values: Tensor | None = None

    @classmethod
    def of(cls, given: Tensor, output: Tensor) -> Rest:
        """What of the input has no counterpart in the output."""
        if given.dim() != output.dim():
            return cls()
        differing = [d for d in range(1, given.dim()) if output.shape[d] != given.shape[d]]
        if len(differing) != 1 or output.shape[differing[0]] > given.shape[differing[0]]:
            return cls()
        dim = differing[0]
        return cls(dim, given.narrow(dim, output.shape[dim], given.shape[dim] - output.shape[dim]))

    def without(self, x: Tensor) -> Tensor:
        """The latent alone."""
        return x if self.values is None else x.narrow(self.dim, 0, x.shape[self.dim] - self.values.shape[self.dim])

    def joined(self, x: Tensor) -> Tensor:
        """The latent with the rest behind it."""
        return x if self.values is None else torch.cat([x, self.values], self.dim)
