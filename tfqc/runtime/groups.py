"""Calls of any number of images for a model that computes a fixed number of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tfqc.runtime.plan import Plan

Given = Tensor | list[Tensor]  # what is a list of images in a call has an entry for each


def groups_of(plan: Plan, values: Mapping[str, Given]) -> list[dict[str, Given]] | None:
    """The tensors of a call, so many images at a time; None where the model takes the call as it is.

    The last group is filled up with its last image. Whatever has rows for all images of the call, where it had rows for
    those of the capture, is divided; several rows for each image stay together.

    Raises:
        ValueError: a list has another number of entries than there are images.
    """
    at_once, given = _images(plan), values[plan.sample.name]
    if at_once is None or len(given) in (0, at_once):
        return None
    if isinstance(given, Tensor) and given.dim() != len(plan.sample.shape):
        return None
    images = len(given)
    for item in plan.inputs:
        if isinstance(listed := values[item.name], list) and len(listed) != images:
            raise ValueError(
                f"{'.'.join(item.path[:-1])} has {len(listed)} entries for {images} images: give one for each."
            )
    captured = {i.name: (1, images) if i.role == "time" else i.shape[:1] for i in plan.inputs}
    groups: list[dict[str, Given]] = []
    for first in range(0, images, at_once):
        picked = [min(number, images - 1) for number in range(first, first + at_once)]
        groups.append({name: _rows(value, picked, images, captured[name]) for name, value in values.items()})
    return groups


def _images(plan: Plan) -> int | None:
    """How many images the model computes at once; None for any number."""
    size = plan.sample.shape[0] if plan.sample.shape else None
    return size if isinstance(size, int) else None


def _rows(value: Given, picked: Sequence[int], images: int, captured: Sequence[int | str]) -> Given:
    if isinstance(value, list):
        return [value[number] for number in picked]
    if value.dim() == 0 or len(value) % images or len(value) == captured[0]:
        return value
    each = len(value) // images
    rows = torch.tensor([image * each + row for image in picked for row in range(each)], device=value.device)
    return value.index_select(0, rows)


def joined(plan: Plan, results: Sequence[Any], images: int) -> Any:
    """What steps on groups return as that of one: rows of images one after the other, the rest as the first has it.

    Rows of images of different sizes are a list.
    """
    at_once, first = _images(plan), results[0]
    assert at_once is not None
    if isinstance(first, tuple):
        parts = cast("tuple[Any, ...]", first)
        return tuple(joined(plan, [result[number] for result in results], images) for number in range(len(parts)))
    if not isinstance(first, Tensor) or first.dim() == 0 or len(first) % at_once:
        return first
    if any(result.shape[1:] != first.shape[1:] for result in results):
        return [row for result in results for row in result][: images * (len(first) // at_once)]
    return torch.cat(list(results))[: images * (len(first) // at_once)]
