"""Programs on disk: IR text, and beside it the tensors in a safetensors file of the same name."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tfqc.errors import IRError
from tfqc.files.storage import read_tensors, read_text, write_tensors, write_text
from tfqc.ir.parse import parse
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.types import storable
from tfqc.runtime.tensors import read_header

_BEGINS = b"tfqc-ir "
_MARK = {"tfqc": "program"}  # metadata of tensors that belong to a program, and may be replaced with it


def save_program(program: Program, path: Path) -> None:
    """Write `path` (IR text) and its `.safetensors`, each beside its place and renamed into it.

    A program without weights has no `.safetensors`; one that stood there is removed.

    Raises:
        IRError: what stands there, or the `.safetensors` beside it, is no program's, or a tensor has a dtype that no
            file holds; nothing is written.
    """
    check_place(path)
    text, weights = render(program), _weights(path)
    for name, tensor in program.tensors.items():
        if reason := storable(name, tensor.dtype):
            raise IRError(f"{path} is not written: {reason}")
    if program.has_weights:
        write_tensors(weights, program.tensors, _MARK)
    else:
        weights.unlink(missing_ok=True)
    write_text(path, text)


def check_place(path: Path) -> None:
    """Refuse to write a program where something else lies.

    Raises:
        IRError: a file stands there that is neither empty nor a program, or a `.safetensors` beside it that is none's.
    """
    weights = _weights(path)
    try:
        if path.exists() and not _is_replaceable(path):
            raise IRError(f"{path} is no program, so it is not replaced: choose another name.")
    except (OSError, ValueError) as error:
        raise IRError(f"{str(path)!a} cannot be written: {error}.") from error
    if weights.exists() and not _is_ours(weights):
        raise IRError(f"{weights} stands beside {path.name}, and is no program's: choose another name.")


def load_program(path: Path) -> Program:
    """Read what `save_program` wrote; without the `.safetensors` the tensors are on the meta device.

    Raises:
        IRError: no such file, malformed text, or tensors of other types than declared.
    """
    if not path.exists():
        raise IRError(f"There is no program {path}: give an .ir file, such as `tfqc compile --dump-ir` writes.")
    text, weights = read_text(path, IRError), _weights(path)
    tensors: dict[str, Tensor] | None = read_tensors(weights, IRError)[0] if weights.exists() else None
    return parse(text, tensors)


def _weights(path: Path) -> Path:
    if not path.name or path.name == ".." or path.suffix == ".safetensors":
        raise IRError(f"{path} is no name for a program: give it one that ends in .ir.")
    return path.with_suffix(".safetensors")


def _is_replaceable(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_BEGINS)) in (b"", _BEGINS)


def _is_ours(weights: Path) -> bool:
    try:
        return read_header(weights).metadata.items() >= _MARK.items()
    except (ValueError, OSError):
        return False
