"""Plots: the disturbance of temporal features over the schedule, and the trajectory's distance to full precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from tfqc.report.disturbance import FeatureErrors

STRATEGY_NAMES = {
    "tib": "quantized TIB (naive)", "cache4": "cache, 4 bits", "cache8": "cache, 8 bits", "table": "fp table",
    "fold": "fold",
}  # fmt: skip


def plot_disturbance(errors: FeatureErrors, path: Path, title: str) -> Path:
    """Heat maps feature × timestep of the cosine error on one logarithmic scale, a panel for each strategy."""
    strategies = list(errors.cosine_error)
    height = 1.9 + 0.27 * len(errors.labels)
    figure = Figure(figsize=(2.2 + 2.9 * len(strategies), height), layout="constrained")
    axes: Any = figure.subplots(1, len(strategies), sharey=True, squeeze=False)[0]
    values = [v for rows in errors.cosine_error.values() for row in rows for v in row if v > 0]
    norm = LogNorm(min(values, default=1e-9), max(values, default=1.0))
    image: Any = None
    for axis, strategy in zip(axes, strategies, strict=True):
        rows = errors.cosine_error[strategy]
        axis.set_facecolor("#f2f2f2")  # of what has no error, and so no logarithm
        image = axis.imshow(
            [[v or float("nan") for v in row] for row in rows],
            aspect="auto",
            norm=norm,
            cmap="magma_r",
            interpolation="nearest",
        )
        if not any(v for row in rows for v in row):
            axis.text(0.5, 0.5, "exact", transform=axis.transAxes, ha="center", va="center", color="#666666")
        axis.set_title(STRATEGY_NAMES.get(strategy, strategy), fontsize=10)
        _timestep_axis(axis, errors.timesteps)
    axes[0].set_yticks(range(len(errors.labels)), errors.labels, fontsize=7.5)
    if values:
        figure.colorbar(image, ax=axes, label="1 − cos(e, ê)", pad=0.01)
    figure.suptitle(title, fontsize=11)
    return _save(figure, path)


def plot_trajectories(
    by_name: Mapping[str, Sequence[float]], timesteps: Sequence[float], path: Path, title: str
) -> Path:
    """PSNR of the latents to full precision after each step, one line for each name."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis: Any = figure.subplots()
    for name, values in by_name.items():
        axis.plot(values, label=f"{name}: {values[-1]:.1f} dB in the end", linewidth=1.8)
    _timestep_axis(axis, timesteps)
    axis.set_ylabel("PSNR of the latents [dB]")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=11)
    return _save(figure, path)


def _timestep_axis(axis: Any, timesteps: Sequence[float]) -> None:
    """Steps in visiting order, named by their timestep."""
    wanted = min(5, len(timesteps))
    places = sorted({round(i * (len(timesteps) - 1) / max(wanted - 1, 1)) for i in range(wanted)})
    axis.set_xticks(places, [f"{timesteps[i]:g}" for i in places], fontsize=8)
    axis.set_xlabel("timestep", fontsize=9)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)
    return path
