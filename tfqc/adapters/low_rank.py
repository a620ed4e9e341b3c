"""What adapters add to a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """A layer's output gets up(down(x)) more (LoRA, arXiv 2106.09685).

    down: [r, K] of a linear; [r, C, *window] of a convolution, and goes over the windows that the layer's own does. up:
    [N, r], times the adapter's scale. Both f32.
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, parts: Sequence[tuple[Tensor, Tensor, float]]) -> LowRank:
        """Several adapters of one layer side by side: each its down [r, ...], its up [N, r, ...], its scale."""
        downs = [down.detach().float() for down, _, _ in parts]
        ups = [up.detach().float().flatten(1) * scale for _, up, scale in parts]
        return cls(torch.cat(downs), torch.cat(ups, 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it stands beside."""
        return (len(self.up), *self.down.shape[1:])
