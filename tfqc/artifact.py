"""Artifacts: a directory of readable source, safetensors, and a manifest with the hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tfqc.errors import ArtifactError
from tfqc.storage import apart

FORMAT = "tfqc-artifact"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass
class Artifact:
    """What a backend emitted, in memory: text files, tensor files, and facts for the manifest (JSON)."""

    texts: dict[str, str]
    tensors: dict[str, Mapping[str, Tensor]]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    def files(self) -> dict[str, bytes]:
        """Every file's bytes; the same bytes for the same artifact."""
        with tempfile.TemporaryDirectory() as scratch:
            self._write(Path(scratch))
            return {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}

    def _write(self, directory: Path) -> None:
        """Write the files, tensors one by one: large models are not copied in memory."""
        for name, text in self.texts.items():
            (directory / name).write_text(text, encoding="utf-8")
        for name, tensors in self.tensors.items():
            save_file(apart(dict(sorted(tensors.items()))), directory / name)
            (directory / name).chmod(directory.stat().st_mode & 0o666)  # safetensors keeps others from reading
        listing = {
            path.name: {"sha256": _hash(path), "bytes": path.stat().st_size} for path in sorted(directory.iterdir())
        }
        manifest = {"format": FORMAT, "version": VERSION, **self.facts, "files": listing}
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def save(self, directory: str | Path) -> Path:
        """Write the directory: beside it first, then renamed, so that an interrupted save leaves what was there.

        Raises:
            ArtifactError: `directory` holds files that are no artifact.
        """
        directory = Path(directory)
        check_output(directory)
        directory.parent.mkdir(parents=True, exist_ok=True)
        beside = directory.with_name(f".{directory.name}.part{os.getpid()}")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            self._write(beside)
            if directory.exists():
                old = directory.with_name(f".{directory.name}.old{os.getpid()}")
                os.replace(directory, old)
                try:
                    os.replace(beside, directory)
                except BaseException:
                    os.replace(old, directory)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(beside, directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return directory


def check_output(directory: Path) -> None:
    """Refuse to write where something else lies.

    Raises:
        ArtifactError: the path is a file, or a directory that holds files that are no artifact's.
    """
    if directory.is_file():
        raise ArtifactError(f"{directory} is a file: choose a directory for the artifact.")
    if not directory.exists():
        return
    present = {p.name for p in directory.iterdir()} - {"__pycache__"}
    known = {MANIFEST}
    if (directory / MANIFEST).is_file():
        try:
            known |= set(json.loads((directory / MANIFEST).read_text())["files"])
        except (ValueError, KeyError):
            known = set()
    if foreign := sorted(present - known):
        raise ArtifactError(
            f"{directory} holds {foreign[0]!r}, which is no part of an artifact: choose another directory."
        )


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """The manifest of a saved artifact.

    Raises:
        ArtifactError: there is none, it is no manifest of ours, or of a newer version.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory} is no artifact: it has no {MANIFEST}.")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}") from error
    ours = isinstance(manifest, dict) and manifest.get("format") == FORMAT
    if not ours or not isinstance(manifest.get("version"), int) or not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"{path} is no manifest of a tfqc artifact.")
    if manifest["version"] > VERSION:
        raise ArtifactError(
            f"{directory} has format version {manifest['version']}, newer than {VERSION}, which this tfqc reads: "
            "upgrade tfqc."
        )
    return manifest


def check_files(directory: str | Path) -> dict[str, Any]:
    """The manifest, after every file has been found with the bytes that it had when it was written.

    Raises:
        ArtifactError: a file is missing or changed (which).
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file():
            raise ArtifactError(f"{directory} is not whole: {name!r} is missing. Compile the model again.")
        if _hash(path) != entry["sha256"]:
            raise ArtifactError(f"{path} has been changed since it was written: compile the model again.")
    return manifest


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
