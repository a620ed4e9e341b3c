"""Artifacts: a directory of readable source, safetensors, and a manifest with the hash of every file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tfqc import registry
from tfqc.codegen import manifest as manifests
from tfqc.codegen import placing
from tfqc.codegen.manifest import MANIFEST, TIME_TENSORS, VERSION
from tfqc.errors import ArtifactError
from tfqc.files.storage import file_hash, said, save_tensors, sync
from tfqc.runtime.cache import locked
from tfqc.runtime.tensors import read_header

__all__ = ["MANIFEST", "VERSION", "Artifact", "check_files", "check_output", "copy_artifact", "read_manifest"]


@dataclass
class Artifact:
    """What a backend emitted, in memory: files of text, tensors and bytes, and facts for the manifest (JSON)."""

    texts: dict[str, str]
    tensors: dict[str, Mapping[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    binaries: dict[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def names(self) -> list[str]:
        """Names of its files, but for the manifest."""
        return [*self.texts, *self.tensors, *self.binaries]

    def __repr__(self) -> str:
        return f"<artifact for {self.facts.get('target', 'no target')}: {', '.join(self.names)}>"

    def files(self) -> dict[str, bytes]:
        """Every file's bytes; the same bytes for the same artifact."""
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch))
            return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}

    def _write(self, directory: Path) -> None:
        """Write the files, tensors one by one: large models are not copied in memory. The manifest comes last."""
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        for name, tensors in self.tensors.items():
            save_tensors(directory / name, tensors)
        for name, data in self.binaries.items():
            (directory / name).write_bytes(data)
        files: dict[str, dict[str, Any]] = {}
        for name in sorted(self.names):
            sync(directory / name)
            files[name] = {"sha256": file_hash(directory / name), "bytes": (directory / name).stat().st_size}
        path = directory / MANIFEST
        path.write_text(manifests.written(self.facts, files, path), encoding="utf-8")
        sync(path)

    def save(self, directory: str | Path) -> Path:
        """Write the directory: beside it first, then renamed, so that an interrupted save leaves what was there.

        A link is followed: the artifact is written to where it points.

        Raises:
            ArtifactError: `directory` holds files that are no artifact's, or it cannot be written; what was there
                still is.
        """
        return _put(directory, self.names, self._write)


def copy_artifact(source: str | Path, directory: str | Path) -> Path:
    """Write a saved artifact to another directory, as `Artifact.save` writes one.

    Raises:
        ArtifactError: the source is not whole, or the directory cannot be written.
    """
    source, names = Path(source), list(check_files(source)["files"])
    if os.path.lexists(directory) and os.path.samefile(source, directory):
        return Path(directory)

    def write(part: Path) -> None:
        for name in [*names, MANIFEST]:
            shutil.copyfile(source / name, part / name)
            sync(part / name)

    return _put(directory, names, write)


def _put(directory: str | Path, names: list[str], write: Callable[[Path], None]) -> Path:
    """Let `write` fill a directory beside, and rename that."""
    given, directory = Path(directory), _place(directory)
    if bad := [name for name in names if not manifests.is_name(name)]:
        raise ArtifactError(f"{bad[0]!a} is no name for a file of an artifact.")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        placing.repair(directory, _whole)
        with locked(directory.parent):
            _check_output(directory)
            checked = _state(directory)
        placing.clean(directory)
        with placing.part_of(directory) as part:
            placing.begin(part, names)
            write(part)
            (part / placing.NAMES).unlink()

            def unchanged() -> None:
                if _state(directory) != checked:  # another process has saved here, or a user: look again
                    _check_output(directory)

            placing.put(part, directory, unchanged)
    except OSError as error:
        raise ArtifactError(f"{given} cannot be written: {said(error)}.") from error
    return given


def check_output(directory: str | Path) -> None:
    """Refuse to write where something else lies.

    An artifact is replaced if its files are as they were written and there are no others.

    Raises:
        ArtifactError: the path is a file, or a directory that holds files that are no artifact's, or nothing can be
            written there.
    """
    directory = _place(directory)
    try:
        above = next(path for path in directory.parents if path.exists())
        if not above.is_dir():
            raise ArtifactError(f"{directory} cannot be written: {above} is a file.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ArtifactError(f"{directory} cannot be written: you may not write to {above}.")
        if above == directory.parent:
            with locked(above):
                _check_output(directory)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be written: {said(error)}.") from error


def _check_output(directory: Path) -> None:
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is a file: choose a directory for the artifact.")
    if directory == Path(os.path.realpath(".")):
        raise ArtifactError(f"{directory} is the current directory: choose one for the artifact alone, such as ./out.")
    try:
        files = manifests.listed(directory / MANIFEST).files if placing.is_plain(directory / MANIFEST) else {}
    except ArtifactError:
        files = {}
    ours = {MANIFEST, placing.CACHED, *files} if files else set[str]()
    if foreign := placing.strange(directory, ours):
        raise ArtifactError(
            f"{directory} holds {foreign!r}, which is no part of an artifact: choose another directory."
        )
    for name, entry in files.items():
        path = directory / name
        if path.exists() and (path.stat().st_size != entry.bytes or file_hash(path) != entry.sha256):
            raise ArtifactError(
                f"{path} has been changed since it was written, so it is not replaced: remove it, or choose another "
                "directory."
            )


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a saved artifact, with defaults for what is optional; see `tfqc.codegen.manifest.Manifest`.

    Where a save was killed between its two renames, the artifact is first put in its place.

    Raises:
        ArtifactError: there is none, it is no manifest of ours, or of another version.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        placing.repair(_place(directory), _whole)
        if not placing.is_plain(path):
            raise ArtifactError(f"{directory} is no artifact: it has no {MANIFEST}.")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{str(directory)!a} is no artifact: {error}.") from error
    return manifests.read(path)


def check_files(directory: str | Path) -> dict[str, Any]:
    """The manifest, after every file has been found with the bytes that it had when it was written, and no other.

    Raises:
        ArtifactError: a file is missing, changed, damaged or too many (which).
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    try:
        _check_files(directory, manifest)
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be read: {said(error)}.") from error
    return manifest


def _check_files(directory: Path, manifest: dict[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = manifest["files"]
    _check_kind(directory, manifest["backend"], set(files))
    for name, entry in files.items():
        path = directory / name
        if not os.path.lexists(path):
            raise ArtifactError(f"{directory} is not whole: {name!r} is missing. Compile the model again.")
        if not placing.is_plain(path):
            raise ArtifactError(f"{path} is no plain file: an artifact's files lie in its own directory.")
        if path.stat().st_size != entry["bytes"]:
            raise _changed(path)
    if extra := placing.strange(directory, {*files, MANIFEST, placing.CACHED}):
        raise ArtifactError(f"{directory} holds {extra!r}, which its {MANIFEST} does not list: remove it.")
    for name, entry in files.items():
        path = directory / name
        if file_hash(path) != entry["sha256"]:
            raise _changed(path)
        if path.suffix == ".safetensors":
            try:
                read_header(path)
            except ValueError as error:
                raise ArtifactError(str(error)) from error


def _check_kind(directory: Path, backend: str | None, files: set[str]) -> None:
    """Refuse other files than artifacts of this backend have, as far as it is installed and says so."""
    wanted = set[str](registry.load("backends", backend).files) if backend in registry.entries("backends") else set()
    if wanted and (missing := sorted(wanted - files)):
        raise ArtifactError(f"{directory} is not whole: its {MANIFEST} does not list {missing[0]!r}.")
    if wanted and (extra := sorted(files - wanted - {TIME_TENSORS})):
        raise ArtifactError(f"{directory} lists {extra[0]!r}, which artifacts of {backend} do not have.")


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} has been changed since it was written: compile the model again.")


def _whole(directory: Path) -> bool:
    """True for an artifact that `check_files` takes, though it may still hold the names that a part begins with."""
    try:
        manifest = manifests.read(directory / MANIFEST)
        for name, entry in manifest["files"].items():
            if not placing.is_plain(directory / name) or file_hash(directory / name) != entry["sha256"]:
                return False
        return placing.strange(directory, {*manifest["files"], MANIFEST, placing.NAMES, placing.CACHED}) is None
    except (ArtifactError, OSError):
        return False


def _place(directory: str | Path) -> Path:
    """Where a path leads."""
    try:
        return Path(os.path.realpath(directory))
    except ValueError as error:  # a NUL
        raise ArtifactError(f"{str(directory)!a} is no directory: {error}.") from error


def _state(directory: Path) -> list[tuple[str, int, int, int]]:
    """What would be different if somebody had written there."""
    if not directory.is_dir():
        return []
    found = [(p.name, p.lstat()) for p in sorted(directory.rglob("*"))]
    return [(name, its.st_ino, its.st_size, its.st_mtime_ns) for name, its in found]
