"""Learned steps of activation quantizers (LSQ, arXiv 1902.08153), a row for each timestep (TALSQ of EfficientDM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tfqc.quant.grid import Grid


class LearnedSteps(nn.Module):
    """A quantizer whose scales are learned, as factors of what they were: s = s0 * exp(theta).

    Zero points stay. Rounding lets gradients through, so that of the scale is LSQ's: x̂/s - x/s inside of the range, and
    the end of the range outside of it.

    Args:
        scale, zero_point: float32 and int32, [1], or [T] with a row for each step of the schedule.
        grid: asymmetric.
        protected: [T, 1, ...] bool, steps at which nothing is quantized.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor, grid: Grid, protected: Tensor | None = None) -> None:
        super().__init__()
        self.grid, self._protected = grid, protected
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.theta = nn.Parameter(torch.zeros_like(scale))

    def forward(self, x: Tensor, steps: Tensor) -> Tensor:
        """x [B, ...], quantized and dequantized; steps [B] int64: which row each image has."""
        scale, zero_point = self.learned(), self.zero_point.float()
        if scale.numel() > 1:
            shape = (-1, *[1] * (x.dim() - 1))
            scale, zero_point = scale[steps].reshape(shape), zero_point[steps].reshape(shape)
        codes = x * scale.reciprocal()
        codes = codes + (codes.round() - codes).detach() + zero_point
        made = (codes.clamp(self.grid.qmin, self.grid.qmax) - zero_point) * scale
        return made if self._protected is None else torch.where(self._protected[steps], x, made)

    def learned(self) -> Tensor:
        """The scales, in the shape that they had."""
        return self.scale * self.theta.exp()
