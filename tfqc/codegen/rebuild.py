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
from typing import Any, ClassVar, Protocol

import torch

from tfqc import version
from tfqc.codegen.artifact import Artifact, read_manifest
from tfqc.codegen.support import Claims, refusals
from tfqc.errors import ArtifactError, TfqcError
from tfqc.files.storage import read_text
from tfqc.ir.parse import parse
from tfqc.ir.program import Program, Stage
from tfqc.ir.types import TensorType
from tfqc.ir.verify import verify
from tfqc.passing.spec import build, parse_specs, to_text
from tfqc.runtime.kept import kept
from tfqc.runtime.tensors import read_header

Tensors = Mapping[str, Mapping[str, str]]  # file -> tensor -> its type, as the IR writes it


class Emitter(Claims, Protocol):
    """What rebuilds: a backend."""

    name: ClassVar[str]
    options: ClassVar[type[Any]]

    def emit(self, program: Program, options: Any) -> Artifact:
        """Files of a lowered program."""
        ...


@dataclass(frozen=True)
class Sources:
    """Texts of a backend's files, and the tensors that each of the others has to hold."""

    texts: Mapping[str, str]
    tensors: Tensors


def rebuild(backend: Emitter, directory: Path) -> torch.nn.Module:
    """The model of a saved artifact whose hashes have been checked; nothing in the directory is run.

    Raises:
        ArtifactError: the program is none that this backend emits for, or the tensors are not those of the program.
        IRError, VerifyError: the program is malformed.
    """
    target = str(read_manifest(directory).get("target", backend.name))
    specs = parse_specs(target)
    if [spec.name for spec in specs] != [backend.name]:
        raise ArtifactError(f"{directory} is for the backend {backend.name!r}, but its target is {target[:80]}.")
    options = build(backend.options, specs[0], "target")
    text = read_text(directory / "program.ir", ArtifactError)
    try:
        sources = _kept_sources(backend, options, to_text(backend.name, options), text)
        for file in sorted({*sources.tensors, *(f.name for f in directory.glob("*.safetensors"))}):
            _check_tensors(directory / file, sources.tensors.get(file, {}))
        module = _module(directory, sources.texts["model.py"])
        kernels = [text for name, text in sources.texts.items() if name.startswith("kernels.")]
        return module.load(directory, *kernels)
    except TfqcError:
        raise
    except Exception as error:  # the program is legal, and still not one that was compiled for this backend
        what = next(iter(str(error).splitlines()), "")
        raise ArtifactError(f"{directory} does not load: {type(error).__name__}: {what}") from error


def _kept_sources(backend: Emitter, options: Any, target: str, text: str) -> Sources:
    def make(path: Path) -> None:
        made = sources_of(backend, options, text)
        path.write_text(json.dumps({"texts": made.texts, "tensors": made.tensors}), encoding="utf-8")

    file = kept(["sources", target, _installed(), text], ".json", make, "modules")
    found = json.loads(file.read_text(encoding="utf-8"))
    return Sources(found["texts"], found["tensors"])


def sources_of(backend: Emitter, options: Any, text: str) -> Sources:
    """What a backend emits for a program's text, without the values of its tensors.

    Raises:
        ArtifactError: the program is not lowered, or the backend does not run it.
    """
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
        entries = read_header(path).entries
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    if beyond := sorted(entries.keys() - declared.keys()):
        raise ArtifactError(f"{path} holds the tensor {beyond[0]!r}, which the artifact's program does not have.")
    for name, text in declared.items():
        if name not in entries:
            raise ArtifactError(f"{path} holds no tensor {name!r}, which the artifact's program reads.")
        given = TensorType(entries[name].dtype, tuple(entries[name].shape))
        if str(given) != text:
            raise ArtifactError(f"{path}: {name!r} is {given}, which the artifact's program declares as {text}.")


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


_OURS = (".py", ".h", ".cpp", ".cuh")


@functools.cache
def _installed() -> str:
    """What is installed, so that what an earlier version emitted is not used."""
    root = Path(version.__file__).parent
    folders = (root, root / "passes", root / "backends")
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in _OURS)
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(repr((version.__version__, torch.__version__, stats)).encode()).hexdigest()
