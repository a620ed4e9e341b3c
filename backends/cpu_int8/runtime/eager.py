"""The methods of `Recorder`, computed at once with torch: what runs where kernels cannot be built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, cat

from tfqc.backends.cpu_int8.runtime.tiles import Tiles
from tfqc.runtime import kernel_ops, ops


class Eager:
    """Kernels' operations as compositions of torch; integer products are exact."""

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        """An operation of `kernel_ops` by its name."""
        function = getattr(kernel_ops, operation, None) or getattr(ops, operation)

        def codes(value: Any) -> Any:
            return value.codes if isinstance(value, Tiles) else value

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            del name
            return function(*map(codes, args), **{key: codes(value) for key, value in kwargs.items()})

        return call

    def view(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A view, or a copy."""
        del name
        return function(*args, **kwargs)

    torch = view

    def concat(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Images next to each other along channels."""
        del name
        return cat([a, b], 1)

    def upsample(self, name: str, x: Tensor, factor: int) -> Tensor:
        """Nearest-neighbour enlargement; codes keep their type."""
        del name
        return F.interpolate(x.float(), scale_factor=float(factor)).to(x.dtype)
