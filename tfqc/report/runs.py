"""Sampling for the record: the latents of every step, the images, the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import TfqcError
from tfqc.models.spec import ModelSpec
from tfqc.progress import Progress
from tfqc.runtime.plan import as_time
from tfqc.sampling.loop import sample
from tfqc.sampling.scheduler import set_to


@dataclass(frozen=True)
class Run:
    """One sampling run of N images.

    latents: after each step, [T, N, ...]; the last are the final ones. images: [N, C, H, W] in 0..1, None where the
    model has no decoder. labels: [N] where images have classes. seconds: of the sampling loop.
    """

    timesteps: tuple[float, ...]
    latents: Tensor
    images: Tensor | None
    labels: Tensor | None
    seconds: float

    @property
    def seconds_per_image(self) -> float:
        """Wall-clock seconds of the loop for one image."""
        return self.seconds / self.latents.shape[1]

    @property
    def seconds_per_step(self) -> float:
        """Wall-clock seconds of one step of the whole batch of images."""
        return self.seconds / self.latents.shape[0]


def draw(
    denoiser: Callable[..., Any],
    spec: ModelSpec,
    scheduler: Any,
    *,
    steps: int,
    images: int,
    seed: int,
    guidance: float | None = None,
    progress: Progress,
    what: str = "sampling",
    batch_size: int = 64,
    time_of: Callable[[Any], float] = as_time,
) -> Run:
    """Sample `images` images; the same seed gives the same noise and conditions to every denoiser.

    Args:
        spec: says what the denoiser is asked (conditions), and how latents become images.
        guidance: the spec's own by default.
        time_of: what the denoiser is called with, for a timestep of the scheduler.

    Raises:
        TfqcError: the denoiser refuses its inputs (such as a timestep that it was not compiled for).
    """
    data = spec.calibration(images, seed)
    steps_seen: list[list[Tensor]] = []

    def on_step(index: int, t: int, latent: Tensor, output: Tensor) -> None:
        if index == len(steps_seen):
            steps_seen.append([])
        steps_seen[index].append(latent)

    scheduler = set_to(scheduler, steps)
    visited = tuple(map(time_of, scheduler.timesteps))
    ticks = progress.track(range(len(visited) * -(-images // batch_size)), what)
    began = time.perf_counter()
    try:
        next(ticks)
        final = sample(
            _by_name(denoiser, spec, data.shared),
            scheduler,
            latents=data.latents,
            cond=data.cond,
            uncond=data.uncond,
            guidance=data.guidance if guidance is None else guidance,
            batch_size=batch_size,
            seed=seed,
            time_of=time_of,
            progress=lambda done, total: next(ticks, None),
            on_step=on_step,
        )
    except (ValueError, TypeError) as error:
        raise TfqcError(f"{spec.name} cannot be sampled: {str(error).rstrip('.')}.") from error
    seconds = time.perf_counter() - began
    for _ in ticks:  # a sampler may need fewer calls than it has timesteps
        pass
    if not bool(torch.isfinite(final).all()):
        raise TfqcError(f"{what}: the result holds NaN or infinity.")
    latents = torch.stack([*(torch.cat(batches) for batches in steps_seen[1:]), final])
    decoded = None if spec.decode is None else spec.decode(final)
    labels = None if spec.labels is None else spec.labels(images, seed)
    return Run(visited, latents, decoded, labels, seconds)


def _by_name(denoiser: Callable[..., Any], spec: ModelSpec, shared: Mapping[str, Tensor]) -> Callable[..., Any]:
    """`denoiser(sample, t, **conditions)` for a model that takes its inputs by other names, in another order, nested,
    and one timestep an image."""

    def call(x: Tensor, t: Tensor, /, **conditions: Tensor) -> Any:
        return denoiser(**spec.call(x, t.expand(len(x)), {**conditions, **shared}))

    return call
