"""What a run has written into a directory that a user gave, remembered there: only that is removed by the next."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tfqc.errors import TfqcError
from tfqc.files.storage import file_hash, parse_json, read_text, write_text

RECORD, REPRODUCER = ".written.json", "reproducer"  # a dump may hold the directory of a reproducer


def check(directory: Path, what: str) -> list[Path]:
    """Make a directory, or make sure that it holds nothing but what an earlier run wrote there, as it was written.

    Args:
        what: is written there, for messages.

    Returns:
        The files that are there.

    Raises:
        TfqcError: the directory holds something else or a changed file, or is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise TfqcError(f"{directory} is a file: choose a directory for the {what}.")
    directory.mkdir(parents=True, exist_ok=True)
    hashes, found = _read(directory), list[Path]()
    for path in sorted(directory.iterdir()):
        plain = path.is_file() and not path.is_symlink()
        if (path.name == RECORD and plain and hashes) or (path.name == REPRODUCER and path.is_dir()):
            continue
        if path.name not in hashes or not plain:
            raise TfqcError(f"{directory} holds {path.name!r}, which is no {what}: choose another directory.")
        if file_hash(path) != hashes[path.name]:
            raise TfqcError(
                f"{path} has been changed since it was written, so it is not replaced: remove it, or choose another "
                "directory."
            )
        found.append(path)
    return found


def clear(directory: Path, what: str) -> None:
    """Make a directory, or remove what an earlier run wrote there.

    Raises:
        TfqcError: as `check`; nothing is removed.
    """
    for path in check(directory, what):
        path.unlink()
    (directory / RECORD).unlink(missing_ok=True)


def remember(directory: Path, *names: str) -> None:
    """Remember files that have been written, as they are."""
    _record(directory, {name: file_hash(directory / name) for name in names if (directory / name).exists()})


def write(directory: Path, name: str, text: str) -> None:
    """Write a text file, and remember it: first, so that a run that is killed does not leave a file of nobody's."""
    _record(directory, {name: hashlib.sha256(text.encode()).hexdigest()})
    write_text(directory / name, text)


def _record(directory: Path, hashes: dict[str, str]) -> None:
    write_text(directory / RECORD, json.dumps(_read(directory) | hashes, indent=1) + "\n")


def _read(directory: Path) -> dict[str, str]:
    """Hashes (SHA-256) by name of file; none where there is no record, or one that is not ours."""
    try:
        value = parse_json(read_text(directory / RECORD, TfqcError), RECORD, TfqcError)
    except TfqcError:
        return {}
    return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else {}
