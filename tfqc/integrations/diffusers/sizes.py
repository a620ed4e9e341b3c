"""Sizes in which a pipeline's calls of its denoiser differ: it is compiled for all of them, not for one prompt's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from tfqc.frontend.dynamic import DynamicDims
from tfqc.frontend.inputs import arguments_by_name
from tfqc.frontend.lists import lists_of_images
from tfqc.frontend.taken import inputs_of
from tfqc.ir.program import Role

Call = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


def differing_sizes(model: torch.nn.Module, calls: Sequence[Call]) -> dict[str, dict[int, str]]:
    """Dimensions in which calls differ, as {input: {dimension: symbol}} with a symbol for each: L0, L1, ...

    The number of images is none of them. A first dimension counts among calls of as many images.
    """
    sizes: dict[tuple[str, int, int], set[int]] = {}
    for images, shapes in (each for call in calls for each in _shapes(model, call)):
        for name, shape in shapes.items():
            for dim, size in enumerate(shape):
                sizes.setdefault((name, dim, 0 if dim else images), set()).add(size)
    places = dict.fromkeys((name, dim) for (name, dim, _), found in sizes.items() if len(found) > 1)
    found: dict[str, dict[int, str]] = {}
    for number, (name, dim) in enumerate(places):
        found.setdefault(name, {})[dim] = f"L{number}"
    return found


def _shapes(model: torch.nn.Module, call: Call) -> Iterator[tuple[int, Shapes]]:
    """How many images a call has, and the shapes of its inputs but its time; of lists of images for each image."""
    example = {name: value for name, value in call.items() if name != "return_dict"}
    found = inputs_of(model, example)
    images = next(len(value) if value.dim() else 1 for item, value in found if item.role is Role.SAMPLE)
    first = {".".join(item.path): tuple(value.shape) for item, value in found if item.role is not Role.TIME}
    yield images, first
    lists = {f"{path[0]}.*": each for path, each in lists_of_images(arguments_by_name(model, example), {}).items()}
    for entries in zip(*lists.values(), strict=True):
        yield images, first | {name: (1, *entry.shape) for name, entry in zip(lists, entries, strict=True)}


def alike(model: torch.nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The first call, and those that differ from it in no size but the number of images."""
    return [call for call in calls if not differing_sizes(model, [calls[0], call])]


def with_sizes(asked: DynamicDims | None, found: Mapping[str, Mapping[int, str]]) -> DynamicDims | None:
    """What a caller asks for, and what was found beside it; of a dimension that both name the caller's holds."""
    texts = [
        each
        if isinstance(each, str)
        else ",".join(f"{name}[{dim}]={symbol}" for name, dims in each.items() for dim, symbol in dims.items())
        for each in (found, asked)
        if each
    ]
    return ",".join(texts) or None
