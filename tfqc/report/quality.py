"""How close two runs are, and how good one is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tfqc.report.runs import Run

# The covariance of 64 features has 2080 numbers: the distance of fewer images says more about their number.
ENOUGH_FOR_FD = 500
IDENTICAL = 140.0  # dB that stand for "no difference": JSON has no infinity

Metrics = Mapping[str, Callable[[Tensor, Tensor], float]]


def psnr(a: Tensor, b: Tensor, data_range: float) -> float:
    """Mean over images of 10 log10(data_range² / mse), in dB; `a` and `b` are [N, ...]. At most `IDENTICAL`."""
    error = (a.double() - b.double()).flatten(1).square().mean(1) / data_range**2
    return float((-10 * error.clamp(min=10 ** (-IDENTICAL / 10)).log10()).mean())


def latent_range(run: Run) -> float:
    """Largest less smallest value of a run's final latents: the data range of the PSNR of latents."""
    final = run.latents[-1]
    return float(final.max() - final.min()) or 1.0


def psnr_by_step(reference: Run, other: Run) -> list[float]:
    """PSNR of the latents after each step, in dB; the data range is `latent_range(reference)`."""
    data_range = latent_range(reference)
    return [psnr(a, b, data_range) for a, b in zip(reference.latents, other.latents, strict=True)]


def psnr_of_images(reference: Run, other: Run) -> float | None:
    """PSNR of the images in dB (data range 1); None without a decoder."""
    if reference.images is None or other.images is None:
        return None
    return psnr(reference.images, other.images, 1.0)


def measure(metrics: Metrics, run: Run) -> tuple[dict[str, float], list[str]]:
    """A model's own metrics of a run's images, and the names of those that need more images than there are."""
    if run.images is None or run.labels is None:
        return {}, list(metrics)
    few = [name for name in metrics if name.startswith("FD(") and len(run.images) < ENOUGH_FOR_FD]
    with torch.no_grad():
        values = {n: metric(run.images, run.labels) for n, metric in metrics.items() if n not in few}
    return {name: value for name, value in values.items() if math.isfinite(value)}, few
