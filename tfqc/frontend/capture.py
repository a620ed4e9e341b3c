"""The front end: a torch module and example inputs become a captured Program, by torch.export."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tfqc.errors import CaptureError
from tfqc.frontend.attempts import Example as _Example
from tfqc.frontend.attempts import program_of
from tfqc.frontend.export import export
from tfqc.frontend.inputs import (
    DynamicDims,
    Example,
    arguments_by_name,
    assign_roles,
    constants_of,
    parameters_of,
    prepare,
    tensors_by_path,
)
from tfqc.ir.program import Program
from tfqc.ir.types import SYMBOL


def capture(
    model: torch.nn.Module,
    example_inputs: Example,
    *,
    roles: Mapping[str, str] | None = None,
    domains: Mapping[str, int] | None = None,
    dynamic: DynamicDims | None = None,
    name: str | None = None,
) -> Program:
    """Capture a denoiser as a Program.

    Args:
        model: called as `model(**example_inputs)` (or positionally). Put in eval mode for the capture.
        example_inputs: tensors of any device; the first dimension of the sample is the batch, and so is that of every
            input with the same first dimension. Not-tensor values are captured as constants.
        roles: input name (dotted for nested ones) -> `sample`, `time` or `request`. By default inputs are
            recognised by the names that diffusers gives them.
        domains: request inputs of integer class labels -> how many labels there are.
        dynamic: further symbolic dimensions: `{"sample": {2: "H", 3: "W"}}`; symbols are capital letters.
        name: what the IR calls the model; its class name by default.

    Raises:
        CaptureError: no input is the time or the sample, or torch.export failed (the message names the line of the
            model's source at which it did).

    Warns:
        FixedWarning: the model's code took a way that is right for one number of images, or for one value of an input
            (which line did it).
    """
    arguments = arguments_by_name(model, example_inputs)
    flat = tensors_by_path(arguments, roles)
    inputs = assign_roles(flat, roles or {}, domains or {})
    if strange := [s for d in (dynamic or {}).values() for s in d.values() if not SYMBOL.fullmatch(s)]:
        raise CaptureError(f"{strange[0]!r} is no name for a dimension: use capital letters, such as 'H'.")
    paths = {i.path for i in inputs}
    constants = {path: value for path, value in constants_of(model, arguments).items() if path not in paths}
    arguments, dims = prepare(arguments, inputs, flat, dict(dynamic or {}))
    program = program_of(_Example(model, arguments, inputs, flat, dims, name or type(model).__name__), export)
    program.arguments = tuple(dict.fromkeys((*parameters_of(model), *arguments)))
    program.constants |= constants
    return program
