"""Fitting the networks of `tfqc.quant.time_scales`: first how much each step costs, then the networks to that.

The error that an input's quantizer makes in the outputs of its layers, at one time, depends on one number, its step. So
it is measured once, on a ladder of steps; in training each network goes down its own curves, at all times at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.optim import STQuantAdam
from tfqc.quant.adaround import Optimizer
from tfqc.quant.time_scales import Codes, Networks, eager, steps_at

RUNGS = 48
LOWEST, HIGHEST = 0.1, 1.25  # rung, of the least step that clips nothing at some time, and of that at all times


@dataclass(frozen=True)
class Layer:
    """A weight [O, K] that multiplies an input, and what it is quantized to; the same where it is not."""

    weight: Tensor
    quantized: Tensor


@dataclass(frozen=True)
class Curves:
    """Errors [T, RUNGS] that an input's step makes in the outputs of its layers at T times, relative to the outputs'
    squares; the logarithms of the steps rise evenly from `first` by `rise`."""

    first: float
    rise: float
    errors: Tensor

    @staticmethod
    def of(rows: Sequence[Sequence[Tensor]], layers: Sequence[Layer], codes: Codes, left_out: Sequence[bool]) -> Curves:
        """Measured on rows [R, K], for each time and each layer; layers that read one value sample it apart.

        left_out: times at which the input is not quantized, so that no step is an error there.
        """
        reach = [max(float(codes.step_for(part.amin(), part.amax())) for part in parts) for parts in rows]
        highest, lowest = max(reach) * HIGHEST, max(min(reach), max(reach) * 1e-3) * LOWEST
        ladder = torch.logspace(0, 1, RUNGS, base=highest / lowest, dtype=torch.float64) * lowest
        errors = torch.zeros(len(rows), RUNGS, dtype=torch.float32)
        for at, parts in enumerate(rows):
            for x, layer in zip(parts if not left_out[at] else (), layers, strict=not left_out[at]):
                errors[at] += _errors(x, layer, ladder.float(), codes)
        logs = ladder.log()
        return Curves(float(logs[0]), float(logs[1] - logs[0]), errors)

    def single(self) -> tuple[float, float]:
        """The one step that is best for all times, and its mean error; of steps that are as good, the largest."""
        error, down = self.errors.mean(0).flip(0).min(0)
        return math.exp(self.first + self.rise * (RUNGS - 1 - int(down))), float(error)

    def least(self) -> float:
        """The mean error with the best step of each time."""
        return float(self.errors.amin(1).mean())


def _errors(x: Tensor, layer: Layer, ladder: Tensor, codes: Codes) -> Tensor:
    """[RUNGS] for one layer at one time."""
    exact = x @ layer.weight.T
    power = exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    found: list[Tensor] = []
    for step in ladder:
        zero = codes.zero_point(step)
        rounded = (x * step.reciprocal()).round_().clamp_(-zero, codes.top - zero).mul_(step)
        found.append((rounded @ layer.quantized.T).sub_(exact).square_().sum() / power)
    return torch.stack(found)


def fit(
    start: Networks,
    curves: Sequence[Curves],
    timesteps: Sequence[float],
    *,
    iterations: int,
    learning_rate: float,
    optimizer: Optimizer = "adam",
    on_iteration: Callable[[], None] | None = None,
) -> tuple[Networks, Tensor]:
    """Networks that make the least sum of errors at `timesteps`, one a row of each curve, and the mean error of each.

    A network that training did not make better stays as it was. Off the ladder errors rise by 1 a rung, so steps
    come back. The rate falls to 0 linearly.

    Raises:
        CalibrationError: the errors are not finite.
    """
    errors = torch.stack([c.errors for c in curves])  # [L, T, RUNGS]
    if not bool(torch.isfinite(errors).all()):
        raise CalibrationError("The outputs of a layer on calibration data are NaN or infinite: the model is broken.")
    first, rise = (torch.tensor([[getattr(c, of)] for c in curves], dtype=torch.float32) for of in ("first", "rise"))
    time = torch.tensor(timesteps, dtype=torch.float32)
    its = start.map(lambda tensor: tensor.clone())
    weights = [weight.requires_grad_() for weight in its.weights()]

    def mean_errors() -> Tensor:
        rung = (steps_at(eager, time, its).log() - first) / rise
        on = rung.clamp(0, RUNGS - 1)
        below = on.detach().floor().clamp(max=RUNGS - 2).nan_to_num()  # NaN stays in what is returned
        low, high = (errors.gather(2, (below.long() + i)[..., None]).squeeze(2) for i in (0, 1))
        return (low + (on - below) * (high - low) + (rung - on).abs()).mean(1)

    with torch.no_grad():
        before = mean_errors()
    adam = (torch.optim.Adam if optimizer == "adam" else STQuantAdam)(weights, lr=learning_rate)
    for iteration in range(iterations):
        for group in adam.param_groups:
            group["lr"] = learning_rate * (1 - iteration / iterations)
        with torch.enable_grad():
            gradients = torch.autograd.grad(mean_errors().sum(), weights)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        adam.step()
        if on_iteration is not None:
            on_iteration()
    with torch.no_grad():
        after = mean_errors()
        better = after < before  # False for NaN
        for weight, old in zip(weights, start.weights(), strict=True):
            weight.copy_(torch.where(better[:, None, None], weight, old))
        return its.map(torch.Tensor.detach), torch.where(better, after, before)
