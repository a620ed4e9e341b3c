"""GPTQ (arXiv 2210.17323): round a weight column by column, letting later columns make up for earlier errors.

Minimises ‖(W − Ŵ) X‖² for the layer's own inputs X, which enter through H = E[x xᵀ] alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.quant.grid import Grid, QuantizedWeight, dequantize, expand_groups, quantize

DAMPING = 0.01  # of the mean of H's diagonal, added to it: H of few or correlated inputs is near singular
BLOCK = 128


def gptq(weight: Tensor, second_moment: Tensor, nearest: QuantizedWeight) -> QuantizedWeight:
    """A weight rounded on the grid and with the scales of `nearest`.

    Args:
        weight: f32 [O, ...], seen as [O, K].
        second_moment: H = E[x xᵀ] of the inputs, [K, K], f32 or f64.
        nearest: the same weight rounded to nearest; gives grid, scales, zero points and groups.

    Raises:
        CalibrationError: H is not finite.
    """
    if not bool(torch.isfinite(second_moment).all()):
        raise CalibrationError("The inputs of a layer have no finite second moments.")
    grid: Grid = nearest.grid
    rest = weight.detach().double().flatten(1).clone()
    scale = expand_groups(nearest.scale, rest.shape, nearest.group)
    zero_point = expand_groups(nearest.zero_point, rest.shape, nearest.group)
    h = second_moment.double().clone()
    diagonal = h.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    # Columns that matter most first, while most others are left to make up for them.
    order = torch.argsort(diagonal, descending=True)
    rest, scale, zero_point = rest[:, order], scale[:, order], zero_point[:, order]
    # Upper Cholesky factor of H⁻¹: its row k holds what column k's error is worth to the columns behind it.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(rest.shape, dtype=torch.int32)
    for begin in range(0, rest.shape[1], BLOCK):
        end = min(begin + BLOCK, rest.shape[1])
        errors = torch.empty(rest.shape[0], end - begin, dtype=torch.float64)
        for k in range(begin, end):
            codes[:, k] = quantize(rest[:, k], scale[:, k], zero_point[:, k], grid)
            rounded = dequantize(codes[:, k], scale[:, k], zero_point[:, k]).double()
            errors[:, k - begin] = (rest[:, k] - rounded) / factor[k, k]
            rest[:, k:end] -= errors[:, k - begin, None] * factor[k, k:end]
        rest[:, end:] -= errors @ factor[begin:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    in_place = codes[:, back].reshape(weight.shape)
    return QuantizedWeight.from_codes(in_place, nearest.scale, nearest.zero_point, grid, nearest.group)
