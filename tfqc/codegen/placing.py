"""Directories of ours take their place by renaming, and what killed processes left is repaired and removed.

An artifact NAME is written to `.NAME.part<pid>-<number>` beside it. What stood there becomes `.NAME.old<pid>-<number>`,
the part becomes NAME, the old one is removed: at any moment one of the three is whole. A part is held by a lock (of the
system: it ends with the process) while it is written, and renaming is done by one process at a time.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from tfqc.codegen.manifest import FORMAT, MANIFEST, is_name, listed
from tfqc.errors import ArtifactError
from tfqc.files.storage import file_hash, parse_json, read_text, sync
from tfqc.runtime.cache import locked

NAMES = f"{MANIFEST}.part"  # in a part: what will be written there, so that it can be removed file by file
CACHED = "__pycache__"  # python's, where somebody has imported model.py
_number = itertools.count()


@contextmanager
def part_of(directory: Path) -> Generator[Path]:
    """An empty directory beside, held by this process, and removed unless it is renamed.

    Raises:
        OSError: it cannot be made.
    """
    with locked(directory.parent):
        part = _beside(directory, "part")
        part.mkdir()
        handle = os.open(part, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield part
    finally:
        with suppress(OSError):
            remove(part)
        os.close(handle)


def put(part: Path, directory: Path, check: Callable[[], None]) -> None:
    """Rename a part to its place. `check` raises if what stands there must not be replaced.

    Raises:
        OSError: it cannot be renamed; what stood there still does.
    """
    sync(part)
    with locked(directory.parent):
        check()
        if not directory.exists() or not any(directory.iterdir()):
            os.replace(part, directory)
        else:
            old = _beside(directory, "old")
            os.replace(directory, old)
            try:
                os.replace(part, directory)
            except BaseException:
                os.replace(old, directory)
                raise
            sync(directory.parent)
            with suppress(OSError):
                remove(old)
        sync(directory.parent)


def repair(directory: Path, whole: Callable[[Path], bool]) -> None:
    """Where a save ended between its two renames, put what it wrote in its place, or else what stood there."""
    if not os.path.lexists(directory) and _left(directory):
        with suppress(OSError), locked(directory.parent):
            found = [left for left in _left(directory) if whole(left)]
            if found and not os.path.lexists(directory):
                best = max(found, key=lambda left: (left / MANIFEST).stat().st_mtime_ns)
                (best / NAMES).unlink(missing_ok=True)
                os.replace(best, directory)
                sync(directory.parent)


def clean(directory: Path) -> None:
    """Remove what killed saves of this place have left beside it."""
    with suppress(OSError), locked(directory.parent):
        for left in _left(directory):
            with suppress(OSError):
                remove(left)


def begin(part: Path, names: list[str]) -> None:
    """Say in a part what will be written there. It names the directory too: such a file of a user's, or a copy of one
    of ours, is not believed."""
    (part / NAMES).write_text(json.dumps({"format": FORMAT, "inode": part.stat().st_ino, "files": names}))


def remove(directory: Path) -> None:
    """Remove a directory of ours, file by file as it lists them; one that holds anything else, or where a file has
    been changed, is left as it is."""
    if not directory.is_dir():
        return
    files = _removable(directory)
    if files is None or strange(directory, files) is not None:
        return
    for file in list(_cached(directory)):
        file.unlink()
    if (directory / CACHED).is_dir():
        (directory / CACHED).rmdir()
    for name in sorted(files - {MANIFEST, NAMES, CACHED}):
        (directory / name).unlink(missing_ok=True)
    for name in (MANIFEST, NAMES):  # last: they say what the others are
        (directory / name).unlink(missing_ok=True)
    directory.rmdir()


def strange(directory: Path, names: set[str]) -> str | None:
    """The first entry that is not a plain file of these names, nor code that python keeps of one."""
    for path in sorted(directory.iterdir()):
        if path.name == CACHED and CACHED in names and stat.S_ISDIR(path.lstat().st_mode):
            for file in path.iterdir():
                if file.suffix != ".pyc" or f"{file.name.split('.')[0]}.py" not in names or not is_plain(file):
                    return f"{CACHED}/{file.name}"
        elif path.name not in names or not is_plain(path):
            return path.name
    return None


def _cached(directory: Path) -> Generator[Path]:
    if (directory / CACHED).is_dir():
        yield from (directory / CACHED).iterdir()


def _removable(directory: Path) -> set[str] | None:
    """What may lie in a directory that is to be removed; None if it is not ours, or not as it was written."""
    try:
        if os.path.lexists(directory / NAMES):
            return _begun(directory)
        if not os.path.lexists(directory / MANIFEST):
            return set()
        files = listed(directory / MANIFEST).files
    except ArtifactError:
        return None
    for name, entry in files.items():
        path = directory / name
        if is_plain(path) and (path.stat().st_size != entry.bytes or file_hash(path) != entry.sha256):
            return None
    return {*files, MANIFEST, CACHED}


def _begun(directory: Path) -> set[str] | None:
    text = read_text(directory / NAMES, ArtifactError)
    if not text:  # killed before it was written
        return {NAMES}
    its = parse_json(text, NAMES, ArtifactError)
    if not isinstance(its, dict) or its.get("format") != FORMAT or its.get("inode") != directory.stat().st_ino:
        return None
    return {*its["files"], MANIFEST, NAMES, CACHED} if all(map(is_name, its["files"])) else None


def _beside(directory: Path, what: str) -> Path:
    while (path := directory.with_name(f".{directory.name}.{what}{os.getpid()}-{next(_number)}")).exists():
        pass
    return path


def _left(directory: Path) -> list[Path]:
    """Parts and old directories of this place that no process holds."""
    ours = re.compile(rf"\.{re.escape(directory.name)}\.(part|old)(\d+)(-\d+)?")
    found: list[Path] = []
    with suppress(OSError):
        for path in directory.parent.iterdir():
            match = ours.fullmatch(path.name) if path.is_dir() and not path.is_symlink() else None
            if match and not _held(path, int(match[2])):
                found.append(path)
    return found


def _held(directory: Path, pid: int) -> bool:
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks: ask whether the process lives
        with suppress(OSError):
            os.kill(pid, 0)
            return True
    finally:
        os.close(handle)
    return False


def is_plain(path: Path) -> bool:
    """True for a file that is no link. Raises OSError where that cannot be asked."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
