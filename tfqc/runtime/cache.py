"""What is made once and used again, in the user's cache: built kernels and modules, calibration trajectories.

Code is loaded from there, so directories are the user's alone, and a file's hash stands in its name: one that is broken
is made again. `tfqc.runtime.pruning` keeps them small.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

MAKING = ".making"  # directories in which a file is made; a lock says whether their process lives


def cache_root() -> Path:
    """The directory of everything that is kept; it need not exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "tfqc"


def cache_directory(kind: str = "kernels") -> Path:
    """Where things of a kind are kept: `kernels`, `modules`, `trajectories`; it need not exist."""
    return cache_root() / kind


def used_now(file: Path) -> None:
    """Note that a file of the cache has been used, so that it is not removed soon."""
    with suppress(OSError):
        os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns))


def private_directory(kind: str) -> Path:
    """The directory of a kind, made if need be; where it is not the user's alone or cannot be written, one of this
    process's own, which ends with it."""
    directory = cache_directory(kind)
    try:
        directory.parent.parent.mkdir(parents=True, exist_ok=True)
        for each in (directory.parent, directory):
            with suppress(FileExistsError):
                each.mkdir(mode=0o700)
            if not is_private(each):
                return _in_own_directory(kind)
            if each.stat().st_mode & 0o077:  # made by an earlier version
                each.chmod(0o700)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError:
        return _in_own_directory(kind)


def is_private(directory: Path) -> bool:
    """True for a directory of this user into which nobody else can write."""
    its = directory.lstat()
    return stat.S_ISDIR(its.st_mode) and its.st_uid == os.geteuid() and not its.st_mode & 0o022


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    """Kept as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="tfqc-cache-")


def _in_own_directory(kind: str) -> Path:
    directory = Path(_own_directory().name, kind)
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def whole(directory: Path, name: str, suffix: str) -> Path | None:
    """The file of a key, if it has the bytes with which it was written; broken ones are removed."""
    for file in sorted(directory.glob(f"{name}-*{suffix}")):
        with suppress(OSError):
            if stat.S_ISREG(file.lstat().st_mode) and file.name == f"{name}-{hash_of(file)}{suffix}":
                return file
            file.unlink()
    return None


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


@contextmanager
def working_directory(directory: Path) -> Generator[Path]:
    """An empty directory, removed in the end; those that killed processes left are removed, too."""
    with locked(directory):
        for left in directory.glob(f"{MAKING}*"):
            remove_unless_held(left)
        work = Path(tempfile.mkdtemp(prefix=MAKING, dir=directory))
        handle = os.open(work, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        _remove(work)
        os.close(handle)


def remove_unless_held(work: Path) -> None:
    """Remove a directory in which something was made, unless that goes on."""
    with suppress(OSError):
        handle = os.open(work, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(work)
        finally:
            os.close(handle)


def _remove(work: Path) -> None:
    """Compilers write files there, no directories."""
    with suppress(OSError):
        for file in work.iterdir():
            file.unlink()
        work.rmdir()


@contextmanager
def locked(directory: Path) -> Generator[None]:
    """One process, and one thread of it, at a time, where the file system has locks."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
