"""Programs as `.pt2` files: what `torch.export.load` reads without tfqc, and what Netron draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import IRError
from tfqc.files.storage import replacing, said
from tfqc.ir.data import ProgramData, Role
from tfqc.ir.dims import evaluate
from tfqc.ir.flat import Instead, flat_module, nested


def save_pt2(program: ProgramData, path: Path) -> None:
    """Write a program as torch.export does, at any stage; of operations of tfqc what they are composed of.

    The loaded `torch.export.load(path).module()` takes the model's arguments by name, timesteps as [B] (a time that is
    not in the schedule is computed as the nearest one), and gives the tensors that the model returns.

    Raises:
        TfqcError: the program has no weights.
        IRError: torch.export does not take it, or the file cannot be written.
    """
    if path.suffix != ".pt2":
        raise IRError(f"{path} is no name for an exported program: give it one that ends in .pt2.")
    exported = exported_program(program)
    try:
        with replacing(path) as part, part.open("wb") as file:
            torch.export.save(exported, file)
    except OSError as error:
        raise IRError(f"{path} cannot be written: {said(error)}.") from error


def exported_program(
    program: ProgramData, instead: Instead | None = None, one_row: bool = False
) -> torch.export.ExportedProgram:
    """The program as torch.export has it: of the model's arguments by name, with the sizes that may differ.

    `instead` and `one_row` are as `flat_module` has them.

    Raises:
        TfqcError: the program has no weights.
        IRError: torch.export does not take it.
    """
    flat, given = flat_module(program, instead, one_row), example_arguments(program)
    sizes = {
        i.name: tuple(
            torch.export.Dim.AUTO if isinstance(dim, str) else torch.export.Dim.STATIC for dim in i.type.shape
        )
        for i in program.inputs
    }
    try:
        with torch.no_grad():
            return torch.export.export(flat, (), given, dynamic_shapes=nested(program, sizes), strict=False)
    except Exception as error:
        why = next(iter(str(error).splitlines()), "").rstrip(".")
        raise IRError(f"{program.model} cannot be exported: {type(error).__name__}: {why[:300]}.") from error


def example_arguments(program: ProgramData) -> dict[str, Any]:
    """A call of the model of the smallest sizes that the program knows of: noise, and zeros."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Tensor] = {}
    for item in program.inputs:
        shape = [evaluate(dim, program.symbols) for dim in item.type.shape]
        if item.role is Role.SAMPLE and item.type.dtype.is_floating_point:
            values[item.name] = torch.randn(shape, generator=generator).to(item.type.dtype)
        else:
            values[item.name] = torch.zeros(shape, dtype=item.type.dtype)
    return nested(program, values)
