"""One row of a request for several images, as pipelines pass it to models that broadcast it (Flux's embeddings)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tfqc.runtime.plan import Plan


class OneForAll:
    """Repeats such rows without a copy. The same view for the same tensor: what a request gives is kept by it."""

    MOST_KEPT = 16

    def __init__(self, plan: Plan) -> None:
        requests = [i for i in plan.inputs if i.role == "request" and len(i.path) == 1]
        self._names = {i.path[0]: len(i.shape) for i in requests if i.shape[:1] == ("B",)}
        self._arguments, self._noisy = plan.arguments, plan.sample.path[0]
        self._kept: dict[tuple[str, int, int, int], tuple[Tensor, Tensor]] = {}

    def spread(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The call with a row for each image."""
        call = {**dict(zip(self._arguments, args, strict=False)), **kwargs}
        sample = call.get(self._noisy)
        images = len(sample) if isinstance(sample, Tensor) and sample.dim() else 1
        single = {
            name: self._repeated(name, value, images)
            for name, rank in self._names.items()
            if isinstance(value := call.get(name), Tensor) and value.dim() == rank and images > len(value) == 1
        }
        return ((), {**call, **single}) if single and len(args) <= len(self._arguments) else (args, kwargs)

    def _repeated(self, name: str, value: Tensor, images: int) -> Tensor:
        key = (name, id(value), value.data_ptr(), images)  # `.data = ...` gives a tensor other values
        if (kept := self._kept.get(key)) is None:
            if len(self._kept) >= self.MOST_KEPT:
                self._kept.clear()
            kept = value, value.expand(images, *value.shape[1:])  # both, so that no id or address is used again
            self._kept[key] = kept
        return kept[1]
