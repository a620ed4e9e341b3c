"""Loading an artifact as data: its code is written anew from its program, by the emitter that is installed.

What lies in the directory beside tensors and `program.ir` is for people to read. The program is parsed and verified,
the backend emits for it, and the tensors in the files have to be those that it declares. What emission gives is kept in
the user's cache by the hash of the program, so the next load does not repeat it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import linecache
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

import tfqc
from tfqc.artifact import read_manifest
from tfqc.errors import ArtifactError
from tfqc.ir.parse import parse
from tfqc.ir.program import Stage
from tfqc.ir.types import TensorType, parse_type
from tfqc.ir.verify import verify
from tfqc.runtime.cache import kept

if TYPE_CHECKING:
    from tfqc.backend import Backend

Tensors = Mapping[str, Mapping[str, str]]  # file -> tensor -> its type, as the IR writes it


@dataclass(frozen=True)
class Sources:
    """Texts of a backend's files, and the tensors that each of the others has to hold."""

    texts: Mapping[str, str]
    tensors: Tensors


def rebuild(backend: Backend, directory: Path) -> torch.nn.Module:
    """The model of a saved artifact whose hashes have been checked; nothing in the directory is run.

    Raises:
        ArtifactError: the program is none that this backend emits for, or the tensors are not those of the program.
        IRError, VerifyError: the program is malformed.
    """
    from tfqc.target import Target  # which knows backends

    target = Target.parse(str(read_manifest(directory).get("target", backend.name)))
    sources = _kept_sources(backend, target.options, str(target), _text(directory / "program.ir"))
    for file, declared in sources.tensors.items():
        _check_tensors(directory / file, declared)
    module = _module(directory, sources.texts["model.py"])
    kernels = [text for name, text in sources.texts.items() if name.startswith("kernels.")]
    return module.load(directory, *kernels)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.") from error


def _kept_sources(backend: Backend, options: Any, target: str, text: str) -> Sources:
    def make(path: Path) -> None:
        made = sources_of(backend, options, text)
        path.write_text(json.dumps({"texts": made.texts, "tensors": made.tensors}), encoding="utf-8")

    found = json.loads(kept(["sources", target, _installed(), text], ".json", make).read_text(encoding="utf-8"))
    return Sources(found["texts"], found["tensors"])


def sources_of(backend: Backend, options: Any, text: str) -> Sources:
    """What a backend emits for a program's text, without the values of its tensors.

    Raises:
        ArtifactError: the program is not lowered, or the backend does not run it.
    """
    from tfqc.backend import refusals

    program = parse(text)
    verify(program)
    if program.stage is not Stage.LOWERED:
        raise ArtifactError(f"The artifact's program is {program.stage}, not lowered for a backend.")
    if refused := refusals(backend, program, options):
        raise ArtifactError(f"{backend.name} does not run the artifact's program.", *refused)
    artifact = backend.emit(program, options)
    types = {
        file: {name: str(TensorType(t.dtype, tuple(t.shape))) for name, t in tensors.items()}
        for file, tensors in artifact.tensors.items()
    }
    return Sources(artifact.texts, types)


def _check_tensors(path: Path, declared: Mapping[str, str]) -> None:
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name, text in declared.items():
                if name not in names:
                    raise ArtifactError(f"{path} holds no tensor {name!r}, which the artifact's program reads.")
                type_, piece = parse_type(text), file.get_slice(name)
                assert isinstance(type_, TensorType)
                if tuple(piece.get_shape()) != type_.shape or _DTYPES.get(piece.get_dtype()) != type_.dtype:
                    given = f"{piece.get_dtype()} {list(piece.get_shape())}"
                    raise ArtifactError(f"{path}: {name!r} is {given}, declared as {text}.")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no whole safetensors file: {error}.") from error


_OURS = (".py", ".h", ".cpp", ".cuh")
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _module(directory: Path, text: str) -> ModuleType:
    """The module of a text, with its lines known to tracebacks."""
    digest = hashlib.sha256(f"{directory.resolve()}\0{text}".encode()).hexdigest()[:12]
    file = f"<{directory.name}/model.py, rebuilt {digest}>"
    module = ModuleType(f"tfqc_rebuilt_{digest}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), module.__dict__)
    return module


@functools.cache
def _installed() -> str:
    """What is installed, so that what an earlier version emitted is not used."""
    root = Path(str(tfqc.__file__)).parent
    folders = (root, root / "passes", root / "backends")
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in _OURS)
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((tfqc.__version__, torch.__version__, stats)).encode()).hexdigest()
