"""A saved artifact as a program with its tensors."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tfqc.codegen.artifact import check_files
from tfqc.codegen.manifest import PROGRAM
from tfqc.errors import ArtifactError
from tfqc.files.storage import read_tensors, read_text
from tfqc.ir.parse import parse
from tfqc.ir.program import Program


def read_program(directory: str | Path) -> Program:
    """The lowered program of an artifact.

    Raises:
        ArtifactError: a file is missing or changed, or the tensors are not those of the program.
        IRError: the program is malformed.
    """
    directory, tensors = Path(directory), dict[str, Tensor]()
    for name in check_files(directory)["files"]:
        if name.endswith(".safetensors"):
            tensors |= read_tensors(directory / name, ArtifactError)[0]
    return parse(read_text(directory / PROGRAM, ArtifactError), tensors)
