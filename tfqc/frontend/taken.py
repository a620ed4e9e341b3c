"""Which tensors a model takes, before it is captured: named, placed and given roles as `capture` does it."""

from __future__ import annotations

import torch
from torch import Tensor

from tfqc.frontend.inputs import (
    Example,
    Roles,
    arguments_by_name,
    assign_roles,
    in_role,
    roles_by_name,
    tensors_by_path,
)
from tfqc.frontend.lists import at_each, lists_of_images, one_image
from tfqc.ir.program import Input, Role


def inputs_of(model: torch.nn.Module, example: Example, roles: Roles | None = None) -> list[tuple[Input, Tensor]]:
    """The tensor inputs of a model, with the example's values: names, places and roles as `capture` has them.

    Where lists have a tensor for each image, the values are those of the example's first image.
    """
    named = roles_by_name(model, example, roles)
    arguments = arguments_by_name(model, example)
    lists = lists_of_images(arguments, named)
    flat = tensors_by_path(one_image(arguments, lists) if lists else arguments, named)
    inputs = assign_roles(flat, named, {})
    return list(zip(at_each(inputs, lists), (flat[item.path] for item in inputs), strict=True))


def times_beside(model: torch.nn.Module, example: Example, roles: Roles | None = None) -> list[str]:
    """Dotted names of times that are no role's: those of tokens or frames, and further ones.

    They change at every step, as samples do, so nothing that depends on them is computed before.
    """
    inputs = inputs_of(model, example, roles)
    times = in_role(Role.TIME, [i.path for i, _ in inputs], roles_by_name(model, example, roles))
    return [".".join(i.path) for i, _ in inputs if i.path in times and i.role is not Role.TIME]
