"""The files of an artifact whose code is trusted: there, unchanged, and of a run time that this one can serve."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
VERSION = 3
"""Of the run time. A model needs the version that its manifest names, or a later one."""


def checked_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, after every file that it lists has been found with its hash.

    Raises:
        ValueError: it is no artifact, not whole, changed, or of a later run time (one sentence).
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files, version = dict(manifest["files"]), int(manifest["runtime"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{directory} is no artifact of tfqc, or not one of this version: {path} says so.") from error
    if version > VERSION:
        raise ValueError(f"{directory} needs version {version} of tfqc's run time, this is {VERSION}: upgrade tfqc.")
    if "model.py" not in files:
        raise ValueError(f"{directory} holds no model.py to run.")
    for name, entry in files.items():
        file = directory / name
        if file.parent != directory or not file.is_file():
            raise ValueError(f"{directory} is not whole: {name!r} is missing. Compile the model again.")
        with file.open("rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
                raise ValueError(f"{file} has been changed since it was written: compile the model again.")
    return manifest
