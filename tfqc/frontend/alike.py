"""Whether a model computes all images of a batch alike, so that other numbers of them can be computed in groups."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import CaptureError
from tfqc.frontend.evaluating import evaluating
from tfqc.frontend.inputs import replaced
from tfqc.ir.program import Input, Role
from tfqc.runtime.outputs import taken_apart

Place = tuple[str, ...]
CLOSE = 1e-3  # of the largest number, f32; in half precision 30 times that


def check_alike(
    model: torch.nn.Module,
    arguments: Mapping[str, Any],
    tensors: Mapping[Place, Tensor],
    inputs: Collection[Input],
    fixed: Collection[Place],
) -> None:
    """Run a model on its example with noise for a sample, and with the images moved up by one.

    Args:
        arguments, tensors: of the call that is captured; tensors by their place in it.
        fixed: inputs that become constants.

    Raises:
        CaptureError: what it returns is not moved up by one.
    """
    sample = next(i.path for i in inputs if i.role is Role.SAMPLE)
    images = len(tensors[sample])
    if images < 2 or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    generator = torch.Generator().manual_seed(0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    noise = torch.randn(tensors[sample].shape, generator=generator).to(tensors[sample])
    given = {path: (noise if path == sample else value).to(device) for path, value in tensors.items()}
    own = {path: value for path, value in given.items() if path not in fixed and value.dim()}
    ways = [
        {path: _moved(value, images) for path, value in own.items()},  # several rows for each image, such as frames
        {path: _moved(value, images) for path, value in own.items() if len(value) == images},  # 16 positions for all
    ]

    def called(values: Mapping[Place, Tensor]) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            return [tensor for _, tensor in taken_apart(model(**replaced(arguments, {**given, **values})))[0]]

    once = called({})
    if not any(_alike(once, called(way), images) for way in ways):
        raise CaptureError(
            f"{type(model).__name__} does not compute all images of a batch alike, so other numbers of images than "
            f"the example's {images} cannot be computed for it in groups: give an example in which all images have "
            "the same masks and sizes."
        )


def _alike(once: list[Tensor], again: list[Tensor], images: int) -> bool:
    for one, other in zip(once, again, strict=True):
        wanted, found = _moved(one, images).double(), other.double()
        close = CLOSE * (1 if one.dtype in (torch.float32, torch.float64) else 30)
        if wanted.shape != found.shape or float((wanted - found).abs().max()) > close * float(wanted.abs().max()):
            return False
    return True


def _moved(value: Tensor, images: int) -> Tensor:
    """The rows of each image where those of the next one were."""
    if value.dim() == 0 or len(value) % images:
        return value
    return value.roll(-(len(value) // images), 0)
