"""Programs on disk: IR text, and beside it the tensors in a safetensors file of the same name."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfqc.errors import IRError
from tfqc.ir.parse import parse
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.storage import apart


def save_program(program: Program, path: Path) -> None:
    """Write `path` (IR text) and its `.safetensors`, each beside its place and renamed into it.

    A program without weights has no `.safetensors`; one that stood there is removed.
    """
    text = render(program)
    weights, part = path.with_suffix(".safetensors"), path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if program.has_weights:
        save_file(apart(program.tensors), part)
        os.replace(part, weights)
    else:
        weights.unlink(missing_ok=True)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def load_program(path: Path) -> Program:
    """Read what `save_program` wrote; without the `.safetensors` the tensors are on the meta device.

    Raises:
        IRError: no such file, malformed text, or tensors of other types than declared.
    """
    if not path.is_file():
        raise IRError(f"There is no program {path}.")
    tensors: dict[str, Tensor] | None = None
    weights = path.with_suffix(".safetensors")
    if weights.exists():
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise IRError(f"{weights} is no whole safetensors file: {error}") from error
    try:
        return parse(path.read_text(encoding="utf-8"), tensors)
    except UnicodeDecodeError as error:
        raise IRError(f"{path} is no text: {error}") from error
