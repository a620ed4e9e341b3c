"""Exporting a model for any number of images, else for the example's: what its code fixes is told, not refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import CaptureError
from tfqc.frontend.alike import check_alike
from tfqc.frontend.build import build_program
from tfqc.frontend.constants import fixed_inputs
from tfqc.frontend.deciding import deciding_inputs
from tfqc.frontend.export import Returned, shared_by_all, source_of
from tfqc.frontend.inputs import images_of, replaced
from tfqc.ir.dims import holds
from tfqc.ir.program import Input, Program, Role
from tfqc.runtime import fixed_value

Place = tuple[str, ...]
Dims = dict[Place, dict[int, str]]
Export = Callable[[torch.nn.Module, dict[str, Any], Dims], tuple[torch.export.ExportedProgram, Returned]]


class FixedWarning(UserWarning):
    """A model's code fixes how many images it takes at once, or decides by the values of an input."""


_MULTIPLE = re.compile(r"B % (\d+) == 0")


@dataclass(frozen=True)
class Example:
    """A model and the call that it is captured from: `arguments` and `dims` as `prepare` gives them, `flat` the tensors
    as they were given.

    each: it is of one image, as what lists of images are made of, and is captured for one at a time.
    """

    model: torch.nn.Module
    arguments: dict[str, Any]
    inputs: list[Input]
    flat: Mapping[Place, Tensor]
    dims: Dims
    name: str
    each: bool = False


def program_of(its: Example, export: Export) -> Program:
    """The program of a model, for any number of images and all values of its inputs if its code allows that.

    Where code decides by the values of request inputs, those of the example become constants of the program. Where it
    fixes the batch, the program takes as many images at once as the example has; where these are not computed alike,
    multiples of a number that the code knows.

    Raises:
        CaptureError: the model cannot be exported so either.
    """
    try:
        return _of_one_image(its, export, []) if its.each else _of_any_batch(its, export)
    except CaptureError as error:
        found = deciding_inputs(its.model, its.arguments, source_of)
        requests = {i.path for i in its.inputs if i.role is Role.REQUEST}
        decided = {path: line for path, line in found.items() if path in requests}
        try:
            program = (_of_one_image if its.each else _of_examples_batch)(its, export, [*decided])
        except CaptureError as second:
            with suppress(CaptureError):  # whole videos, where the batch is their frames
                if not its.each:
                    return _of_any_batch(its, export, multiples=True)
            if others := [path for path in found if path not in requests]:
                raise CaptureError(
                    f"{its.name} decides at {found[others[0]]} by the values of {'.'.join(others[0])}, which differ "
                    "from step to step: compute that without a Python value, or without a size that hangs on it.",
                    str(second),
                ) from second
            raise second from error
        reasons = [
            f"{'.'.join(path)} has one value for good, by which {line} decides" for path, line in decided.items()
        ]
        if isinstance(program.batch, int):
            its_images = "1 image is" if program.batch == 1 else f"{program.batch} images are"
            reasons.append(f"{its_images} computed at once, other numbers so many at a time")
        warnings.warn(f"{its.name}: {'; '.join(reasons)} ({error})", FixedWarning, stacklevel=3)
        return program


def _of_any_batch(its: Example, export: Export, multiples: bool = False) -> Program:
    dims = {path: dict(own) for path, own in its.dims.items()}
    exported, returned = export(its.model, its.arguments, dims)
    shared = shared_by_all(exported, its.inputs, dims)
    for number, (path, fixed) in enumerate(shared.items()):
        if fixed:
            del dims[path][0]
        else:
            dims[path][0] = f"N{number}"
    if any(shared.values()):
        given = {path: its.flat[path] for path, fixed in shared.items() if fixed}
        exported, returned = export(its.model, replaced(its.arguments, given), dims)
    program = build_program(its.model, exported, returned, its.inputs, dims, its.name, multiples)
    found = [match for guard in program.guards if (match := _MULTIPLE.fullmatch(guard))] if multiples else []
    each = int(found[0][1]) if found else 1
    for guard in program.guards:
        if any(not holds(guard, program.symbols | {"B": each * images}) for images in (1, 2, 3, 4, 8)):
            raise CaptureError(f"{its.name} cannot be captured for every B: its code depends on {guard}.")
    return program


def _of_examples_batch(its: Example, export: Export, decided: list[Place]) -> Program:
    """With the example twice, where it is of one image; where code takes no more than one, with that one."""
    try:
        return _of_one_batch(its, export, decided)
    except CaptureError:
        if images_of(its.inputs, its.flat) != 1:
            raise
        return _of_one_image(its, export, decided)


def _of_one_image(its: Example, export: Export, decided: list[Place]) -> Program:
    once = {i.path: its.flat[i.path].detach() for i in its.inputs if i.role is not Role.TIME}
    times = {i.path: _at(its.arguments, i.path)[:1] for i in its.inputs if i.role is Role.TIME}
    return _of_one_batch(replace(its, arguments=replaced(its.arguments, once | times)), export, decided)


def _of_one_batch(its: Example, export: Export, decided: list[Place]) -> Program:
    dims = {path: {d: symbol for d, symbol in own.items() if symbol != "B"} for path, own in its.dims.items()}
    tensors = {i.path: _at(its.arguments, i.path) for i in its.inputs}
    values = {path: tensors[path] for path in decided}
    inputs = [i for i in its.inputs if i.path not in values]

    def made() -> Program:
        exported, returned = export(its.model, its.arguments, dims)
        return build_program(its.model, exported, returned, inputs, dims, its.name)

    try:
        with fixed_inputs(its.model, values) if values else nullcontext():
            program = made()
    except CaptureError:
        if values:
            raise
        with fixed_inputs(its.model, {}):  # code may decide by the values of what it makes of sizes
            program = made()
    program.constants = {path: fixed_value(value) for path, value in values.items()}
    check_alike(its.model, its.arguments, tensors, its.inputs, values)
    return program


def _at(arguments: Mapping[str, Any], path: Place) -> Any:
    value: Any = arguments
    for key in path:
        value = value[int(key)] if isinstance(value, (list, tuple)) else {str(k): v for k, v in value.items()}[key]
    return value
