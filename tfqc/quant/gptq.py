"""GPTQ (arXiv 2210.17323): round a weight column by column, letting later columns make up for earlier errors.

Minimises ‖(W − Ŵ) X‖² for the layer's own inputs X, which enter through H = E[x xᵀ] alone.

The paper hands on e_k = (v_k − ŵ_k) / U_kk by row k of U, the upper Cholesky factor of H⁻¹, where v_k is column k with
all that was handed to it. So W − Ŵ = E U, and with R = U⁻¹, which is upper triangular and has H = R Rᵀ, E = (W − Ŵ) R:

    v_k = w_k + Σ_{j<k} (w_j − ŵ_j) R_jk / R_kk

needs no inverse, a quarter of the work. (Seen as Babai's nearest plane: arXiv 2507.18553.)
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.quant.grid import Grid, QuantizedWeight, expand_groups

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
    h = second_moment.double().clone()
    diagonal = h.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    # Columns that matter most first, while most others are left to make up for them.
    order = torch.argsort(diagonal, descending=True)
    # H = R Rᵀ with R upper triangular: the Cholesky factor of H with its rows and columns in reverse order.
    backwards = order.flip(0)
    worth = torch.linalg.cholesky(h[backwards][:, backwards]).flip(0, 1).contiguous()
    worth /= worth.diagonal().clone()
    flat = weight.detach().flatten(1)
    scale, zero_point = (expand_groups(p, flat.shape, nearest.group) for p in (nearest.scale, nearest.zero_point))
    columns, scale, zero_point = (each[:, order].T.contiguous() for each in (flat.double(), scale, zero_point))
    codes = torch.empty(flat.shape, dtype=torch.int8)
    codes[:, order] = _round_columns(columns, scale, zero_point, worth, grid).T
    return QuantizedWeight(codes.reshape(weight.shape), nearest.scale, nearest.zero_point, grid, nearest.group)


def _round_columns(weight: Tensor, scale: Tensor, zero_point: Tensor, worth: Tensor, grid: Grid) -> Tensor:
    """Codes [K, O] as they are stored, i8, of a weight's columns, which are rows here; all is in the order of rounding.

    Row k of `worth` [K, K] says what column k's error adds to the columns behind it. The arithmetic is that of
    `quantize` and `dequantize`, in numpy: a column has hundreds of values, and torch takes longer to begin an operation
    than to do it.
    """
    rest = weight.clone()
    given, wanted, ahead = weight.numpy(), rest.numpy(), worth.numpy()
    reciprocal, steps, zeros = scale.reciprocal().numpy(), scale.numpy(), zero_point.float().numpy()
    errors = torch.empty_like(weight)
    lost = errors.numpy()
    codes = torch.empty(weight.shape, dtype=torch.int8)
    stored = codes.numpy()
    for begin in range(0, len(weight), BLOCK):
        end = min(begin + BLOCK, len(weight))
        for k in range(begin, end):
            q = np.rint(wanted[k].astype(np.float32) * reciprocal[k])
            q += zeros[k]
            np.clip(q, grid.qmin, grid.qmax, out=q)
            stored[k] = q + grid.storage_shift
            np.subtract(given[k], (q - zeros[k]) * steps[k], out=lost[k])
            wanted[k + 1 : end] += ahead[k, k + 1 : end, None] * lost[k]
        rest[end:] += worth[begin:end, end:].T @ errors[begin:end]
    return codes
