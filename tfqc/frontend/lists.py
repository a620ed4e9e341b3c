"""Samples that are a list with a tensor for each image, and what is listed beside them: captured for one image."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError
from tfqc.frontend.evaluating import evaluating
from tfqc.frontend.inputs import SAMPLE_NAMES, TIME_NAMES
from tfqc.ir.program import Input
from tfqc.runtime.outputs import EachImage, taken_apart

Place = tuple[str, ...]
CLOSE = 1e-3  # of the largest number, f32; in half precision 30 times that


def lists_of_images(arguments: Mapping[str, Any], roles: Mapping[str, str]) -> dict[Place, list[Tensor]]:
    """The lists of a call that have a tensor for each image, by their place; none where the sample is no list.

    A sample is a list of images if it is said to be by its own name, or is called as samples are; a time that tells
    another number of images speaks against it.
    """
    found = {(name,): list(value) for name, value in arguments.items() if _is_list(value)}
    said = {name for name, role in roles.items() if role == "sample"}
    samples = [path for path in found if (path[0] in said if said else path[0] in SAMPLE_NAMES)]
    if not samples:
        return {}
    images = len(found[samples[0]])
    clocks = [v for name, v in arguments.items() if (roles.get(name) == "time" or name in TIME_NAMES)]
    if any(isinstance(t, Tensor) and t.numel() not in (1, images) for t in clocks):
        return {}
    return {path: entries for path, entries in found.items() if len(entries) == images}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, Tensor) for each in value)


def one_image(arguments: Mapping[str, Any], lists: Mapping[Place, list[Tensor]], number: int = 0) -> dict[str, Any]:
    """A call for one of its images: its entry of each list as [1, ...], its row of what has a row for each image."""
    images = len(next(iter(lists.values())))

    def of(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == images
        return value[number : number + 1] if rows else value

    others = {name: value for name, value in arguments.items() if (name,) not in lists}
    own = {path[0]: entries[number].unsqueeze(0) for path, entries in lists.items()}
    return {name: own[name] if name in own else pytree.tree_map(of, others[name]) for name in arguments}


def differing(lists: Mapping[Place, list[Tensor]]) -> dict[Place, dict[int, str]]:
    """Dimensions of [1, entry] in which the entries of a list differ, with a symbol for each: L0, L1, ..."""
    found: dict[Place, dict[int, str]] = {}
    for path, entries in lists.items():
        shapes = {tuple(entry.shape) for entry in entries}
        if len({len(shape) for shape in shapes}) > 1:
            raise CaptureError(f"{'.'.join(path)} holds tensors of several ranks: give one for each image, all alike.")
        for dim, sizes in enumerate(zip(*shapes, strict=True), 1):
            if len(set(sizes)) > 1:
                found.setdefault(path, {})[dim] = f"L{sum(map(len, found.values()))}"
    return found


def at_each(inputs: Iterable[Input], lists: Collection[Place]) -> list[Input]:
    """Inputs with the places that they have in a program: `x.*` for a list that is at `x`."""
    return [replace(item, path=(*item.path, "*")) if item.path in lists else item for item in inputs]


@contextmanager
def as_lists(model: torch.nn.Module, lists: Collection[Place]) -> Generator[None]:
    """Within it the model takes [1, ...] for a list of one tensor, and marks lists of one that it returns."""
    if not lists:
        yield
        return

    def enter(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {k: list(v.unbind(0)) if (k,) in lists else v for k, v in kwargs.items()}

    def leave(_module: torch.nn.Module, _args: Any, output: Any) -> Any:
        return _marked(output)

    hooks = [model.register_forward_pre_hook(enter, with_kwargs=True), model.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _marked(output: Any) -> Any:
    if type(output) is list and len(output) == 1 and isinstance(output[0], Tensor):
        return EachImage(output)
    if type(output) in (list, tuple):
        return type(output)(map(_marked, output))
    if type(output) is dict:
        return {key: _marked(value) for key, value in output.items()}
    return output


def check_each(model: torch.nn.Module, arguments: Mapping[str, Any], lists: Mapping[Place, list[Tensor]]) -> None:
    """Run a model on its example, and on each image of it alone.

    Raises:
        CaptureError: an image is not what it is alone.
    """
    images = len(next(iter(lists.values())))
    if images < 2 or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    arguments = pytree.tree_map_only(Tensor, lambda t: t.to(device), dict(arguments))
    lists = {path: list(arguments[path[0]]) for path in lists}
    apart: list[tuple[Any, Any]] = []
    with evaluating(model), torch.no_grad():
        whole = model(**arguments)
        for number in range(images):
            own = one_image(arguments, lists, number)
            alone = model(**own | {path[0]: [entries[number]] for path, entries in lists.items()})
            apart.append((_of_image(whole, number, images), alone))
    if not all(_close(one, other) for one, other in apart):
        raise CaptureError(
            f"{type(model).__name__} does not compute the images of {', '.join('.'.join(p) for p in lists)} each by "
            "itself, so they cannot be computed one after the other: give lists that have one tensor for each image, "
            "and a module around it for whatever else is a list."
        )


def _of_image(output: Any, number: int, images: int) -> Any:
    """An image's part of what a model returns."""
    if isinstance(output, (list, tuple)):
        if len(output) == images and _is_list(output) and isinstance(output, list):
            return [output[number]]
        return [_of_image(each, number, images) for each in output]
    if isinstance(output, dict):
        return {key: _of_image(each, number, images) for key, each in output.items()}
    rows = isinstance(output, Tensor) and output.dim() > 0 and len(output) == images
    return output[number : number + 1] if rows else output


def _close(one: Any, other: Any) -> bool:
    pairs = list(zip(*([tensor for _, tensor in taken_apart(each)[0]] for each in (one, other)), strict=False))
    return all(a.shape == b.shape and float((a - b).abs().max()) <= _most(b) for a, b in pairs)


def _most(value: Tensor) -> float:
    return CLOSE * (1 if value.dtype in (torch.float32, torch.float64) else 30) * float(value.abs().max())
