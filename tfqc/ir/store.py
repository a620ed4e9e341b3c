"""Programs on disk: IR text, and beside it the tensors in a safetensors file of the same name."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tfqc.errors import IRError
from tfqc.ir.parse import parse
from tfqc.ir.program import Program
from tfqc.ir.render import render


def save_program(program: Program, path: Path) -> None:
    """Write `path` (IR text) and, unless the program has no weights, its `.safetensors`; both beside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if program.has_weights:
        tensors = {name: t.detach().contiguous().clone() for name, t in program.tensors.items()}
        beside = path.with_suffix(".safetensors.part")
        save_file(tensors, beside)
        os.replace(beside, path.with_suffix(".safetensors"))
    beside = path.with_suffix(".ir.part")
    beside.write_text(render(program))
    os.replace(beside, path)


def load_program(path: Path) -> Program:
    """Read what `save_program` wrote; without the `.safetensors` the tensors are on the meta device.

    Raises:
        IRError: no such file, malformed text, or tensors of other types than declared.
    """
    if not path.is_file():
        raise IRError(f"There is no program {path}.")
    tensors: dict[str, torch.Tensor] | None = None
    weights = path.with_suffix(".safetensors")
    if weights.exists():
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise IRError(f"{weights} is no whole safetensors file: {error}") from error
    return parse(path.read_text(), tensors)
