"""Calls of any number of images for a model that computes a fixed number of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tfqc.runtime.plan import Plan


def groups_of(plan: Plan, values: Mapping[str, Tensor]) -> list[dict[str, Tensor]] | None:
    """The tensors of a call, so many images at a time; None where the model takes the call as it is.

    The last group is filled up with its last image. Whatever has rows for all images of the call, where it had rows for
    those of the capture, is divided; several rows for each image stay together.
    """
    at_once, given = _images(plan), values[plan.sample.name]
    if at_once is None or given.dim() != len(plan.sample.shape) or len(given) in (0, at_once):
        return None
    images = len(given)
    captured = {i.name: (1, images) if i.role == "time" else i.shape[:1] for i in plan.inputs}
    groups: list[dict[str, Tensor]] = []
    for first in range(0, images, at_once):
        picked = [min(number, images - 1) for number in range(first, first + at_once)]
        groups.append({name: _rows(value, picked, images, captured[name]) for name, value in values.items()})
    return groups


def _images(plan: Plan) -> int | None:
    """How many images the model computes at once; None for any number."""
    size = plan.sample.shape[0] if plan.sample.shape else None
    return size if isinstance(size, int) else None


def _rows(value: Tensor, picked: Sequence[int], images: int, captured: Sequence[int | str]) -> Tensor:
    if value.dim() == 0 or len(value) % images or len(value) == captured[0]:
        return value
    each = len(value) // images
    rows = torch.tensor([image * each + row for image in picked for row in range(each)], device=value.device)
    return value.index_select(0, rows)


def joined(plan: Plan, results: Sequence[Any], images: int) -> Any:
    """What steps on groups return as that of one: rows of images one after the other, the rest as the first has it."""
    at_once, first = _images(plan), results[0]
    assert at_once is not None
    if isinstance(first, tuple):
        parts = cast("tuple[Any, ...]", first)
        return tuple(joined(plan, [result[number] for result in results], images) for number in range(len(parts)))
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) % at_once:
        return first
    return torch.cat(list(results))[: images * (len(first) // at_once)]
