"""The front end: a torch module and example inputs become a captured Program, by torch.export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.errors import CaptureError
from tfqc.frontend.attempts import Example as _Example
from tfqc.frontend.attempts import program_of
from tfqc.frontend.dynamic import DynamicDims, places, ranges, read_dynamic
from tfqc.frontend.export import Returned, export
from tfqc.frontend.inputs import (
    Example,
    Roles,
    arguments_by_name,
    assign_roles,
    constants_of,
    for_each_image,
    images_of,
    parameters_of,
    prepare,
    roles_by_name,
    tensors_by_path,
)
from tfqc.frontend.lists import as_lists, at_each, check_each, differing, lists_of_images, one_image
from tfqc.frontend.unwrap import refuse_caches, unwrapped
from tfqc.ir.program import Program


def capture(
    model: torch.nn.Module,
    example_inputs: Example,
    *,
    roles: Roles | None = None,
    domains: Mapping[str, int] | None = None,
    dynamic: DynamicDims | None = None,
    name: str | None = None,
) -> Program:
    """Capture a denoiser as a Program.

    Args:
        model: called as `model(**example_inputs)` (or positionally). Put in eval mode for the capture. One inside
            `torch.compile` or DataParallel is taken out of it.
        example_inputs: tensors of any device and floating point type; the first dimension of the sample is the batch,
            and so is that of every input with the same first dimension. Not-tensor values are captured as constants. A
            sample that is a list of tensors, one for each image, is computed image by image, with what is beside it in
            lists of as many; sizes in which the entries of a list differ may differ from call to call.
        roles: input name (dotted for nested ones) or position -> `sample`, `time` or `request`; or these in order, or a
            function of an input's name and example. By default inputs are recognised by the names that diffusers
            gives them. A time that is not one number for each image (of tokens, frames, embedded already), and times
            beside the first, change at every step as samples do; a model may be told none.
        domains: request inputs of integer class labels -> how many labels there are.
        dynamic: further dimensions that may differ from call to call: `"H,W"` of the sample, `"H:16..128"` in a range,
            `"hidden_states[1]=S"` of any input, or a mapping `{"sample": {2: "H", 3: "W"}}`.
        name: what the IR calls the model; its class name by default.

    Raises:
        CaptureError: no input is the sample, one may be the time and is not said to be, the model skips blocks at some
            steps (a cache), or torch.export failed (the message names the line of the model's source at which it did).

    Warns:
        FixedWarning: the model's code took a way that is right for one number of images, or for one value of an input
            (which line did it).
    """
    model = unwrapped(model)
    refuse_caches(model)
    roles = roles_by_name(model, example_inputs, roles)
    whole = arguments_by_name(model, example_inputs)
    lists = lists_of_images(whole, roles)
    arguments = one_image(whole, lists) if lists else whole
    flat = tensors_by_path(arguments, roles)
    inputs = assign_roles(flat, roles, domains or {})
    asked = read_dynamic(dynamic)
    placed = at_each(inputs, lists)
    shapes = {item.path: tuple(flat[own.path].shape) for item, own in zip(placed, inputs, strict=True)}
    own_dims = places(asked, placed, shapes)
    asked_at = {own.path: own_dims.get(item.path, {}) for item, own in zip(placed, inputs, strict=True)}
    for path, dims in differing(lists).items():
        asked_at[path] = dims | asked_at[path]
    paths = {i.path for i in inputs}
    constants = {path: value for path, value in constants_of(model, arguments).items() if path not in paths}
    constants = for_each_image(constants, images_of(inputs, flat))
    arguments, dims = prepare(arguments, inputs, flat, asked_at)
    example = _Example(model, arguments, inputs, flat, dims, name or type(model).__name__, each=bool(lists))
    with as_lists(model, lists):
        program = program_of(example, _export)
    if lists:
        check_each(model, whole, lists)
        program.inputs = tuple(at_each(program.inputs, lists))
    program.arguments = tuple(dict.fromkeys((*parameters_of(model), *arguments)))
    program.constants |= constants
    program.guards = (*program.guards, *ranges(asked))
    return program


def _export(
    model: torch.nn.Module, arguments: dict[str, Any], dims: dict[tuple[str, ...], dict[int, str]]
) -> tuple[torch.export.ExportedProgram, Returned]:
    """With the example as it was given; where that is refused, in the floating point type of the weights."""
    try:
        return export(model, arguments, dims)
    except CaptureError as error:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        cast = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, arguments)
        before, after = (pytree.tree_leaves(each) for each in (arguments, cast))
        if all(a is b for a, b in zip(before, after, strict=True)):
            raise
        try:
            return export(model, cast, dims)
        except CaptureError:
            raise error from error.__cause__
