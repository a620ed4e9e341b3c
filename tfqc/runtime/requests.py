"""What is computed once for each image, kept by the inputs that it was computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Request:
    """What was computed for one set of request inputs; holding the inputs keeps their identities from being reused.

    `broken` are the images [B] of whose inputs one is NaN or infinite; None where there is none.
    """

    inputs: dict[str, Tensor]
    batch: int
    versions: tuple[int, ...]
    copies: dict[str, Tensor]
    hoisted: dict[str, Tensor]
    tables: dict[str, Tensor]
    broken: Tensor | None

    @classmethod
    def of(cls, inputs: dict[str, Tensor], batch: int) -> Request:
        """With nothing computed yet."""
        copies = {k: v.clone() for k, v in inputs.items() if v.is_inference() or v.device.type == "cpu"}
        return cls(inputs, batch, versions(inputs), copies, {}, {}, broken_images(inputs, batch))

    def serves(self, inputs: Mapping[str, Tensor], batch: int) -> bool:
        """True if the inputs are the same tensors, unchanged.

        Versions miss what is written past torch (`.data`, numpy), and inference tensors have none. So values are
        compared too, but for those on a device that would have to be waited for.
        """
        if batch != self.batch or any(self.inputs[k] is not v for k, v in inputs.items()):
            return False
        if self.versions != versions(inputs):
            return False
        return all(same(copied, inputs[k]) for k, copied in self.copies.items())


def versions(inputs: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Counts of torch's own writes to tensors."""
    return tuple(-1 if t.is_inference() else t._version for t in inputs.values())


def same(a: Tensor, b: Tensor) -> bool:
    """Equal values; NaN is itself."""
    if torch.equal(a, b):
        return True
    return a.is_floating_point() and bool(torch.isclose(a, b, 0, 0, equal_nan=True).all())


def broken_images(inputs: Mapping[str, Tensor], batch: int) -> Tensor | None:
    """Which images [batch] have NaN or infinity in one of their inputs; None where none can have.

    Kernels turn both into codes like any other, and images made of them look plausible. -inf in a mask means no. On a
    device the answer is not waited for.
    """
    found: Tensor | None = None
    for name, value in inputs.items():
        if not value.is_floating_point() or (value.device.type == "cpu" and all_finite(value)):
            continue
        bad = ~torch.isfinite(value)
        if "mask" in name or "bias" in name:
            bad = torch.isnan(value) | torch.isposinf(value)
        per_image = bad.reshape(batch, -1).any(1) if value.shape[:1] == (batch,) else bad.any().expand(batch)
        found = per_image if found is None else found | per_image
    return found


def all_finite(x: Tensor) -> bool:
    """True if no value is NaN or infinite; one sweep, and a second only where the sum overflows."""
    total = x.sum().item()
    return total - total == 0 or bool(torch.isfinite(x).all())
