"""The cache stays small: what has not been used for long is removed, and the oldest of what is too much."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tfqc.runtime.cache import MAKING, cache_root, is_private, locked, remove_unless_held

KINDS = ("kernels", "modules", "trajectories")
LIMIT, DAYS = 10 << 30, 30.0  # TFQC_CACHE_LIMIT, TFQC_CACHE_DAYS
IN_USE = 3600.0  # seconds: a running compile reads its trajectories again and again
LOOKED, EVERY = ".pruned", 600.0  # a file whose age says when the cache was looked through; seconds
_OURS = re.compile(r"(trajectory-)?[0-9a-f]{16,}\b.*")

_N = TypeVar("_N", int, float)


@dataclass(frozen=True)
class Kept:
    """A file or directory of the cache: bytes, and the time (seconds since the epoch) of its last use."""

    kind: str
    path: Path
    bytes: int
    used: float


def contents() -> list[Kept]:
    """What the cache holds, the last used first."""
    found = [
        Kept(directory.name, path, *_measure(path)) for directory in _directories() for path in _entries(directory)
    ]
    return sorted(found, key=lambda kept: -kept.used)


def prune(limit: int | None = None, days: float | None = None, in_use: float = IN_USE) -> list[Kept]:
    """Remove what was used more than `days` ago, then the oldest until `limit` bytes are left.

    Args:
        limit, days: by default of the environment (`TFQC_CACHE_LIMIT` in bytes, or `10G`; `TFQC_CACHE_DAYS`), else 10
            GiB and 30 days. What makes no sense there is not regarded.
        in_use: what was used within so many seconds stays.

    Returns:
        What was removed.
    """
    limit = _from_environment("TFQC_CACHE_LIMIT", size, LIMIT) if limit is None else limit
    days = _from_environment("TFQC_CACHE_DAYS", float, DAYS) if days is None else days
    now, total, removed = time.time(), 0, list[Kept]()
    for directory in _directories():
        with locked(directory):  # one that is being made is not held yet
            for left in directory.glob(f"{MAKING}*"):
                remove_unless_held(left)
    for kept in contents():
        age = now - kept.used
        if age <= in_use or (age <= days * 86400 and total + kept.bytes <= limit):
            total += kept.bytes
        elif _discard(kept.path):
            removed.append(kept)
    return removed


def prune_at_times() -> None:
    """Prune, unless that was done in the last minutes: looking through a full cache takes a second."""
    stamp = cache_root() / LOOKED
    with suppress(OSError):
        if not is_private(cache_root()) or (stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < EVERY):
            return
        stamp.touch()
        prune()


def size(text: str) -> int:
    """Bytes of `500M`, `1.5G`, or a number.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{text!r} is no size: give bytes, or a number with K, M, G or T.")
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))


def _from_environment(name: str, read: Callable[[str], _N], otherwise: _N) -> _N:
    with suppress(ValueError):
        return read(os.environ.get(name, ""))
    return otherwise


def _directories() -> list[Path]:
    """Those of the cache that are this user's alone."""
    with suppress(OSError):
        if is_private(cache_root()):
            return [d for kind in KINDS if (d := cache_root() / kind).is_dir() and is_private(d)]
    return []


def _entries(directory: Path) -> Iterator[Path]:
    """What we have put there; never what a user did."""
    with suppress(OSError):
        yield from (path for path in directory.iterdir() if _OURS.fullmatch(path.name) and not path.is_symlink())


def _measure(path: Path) -> tuple[int, float]:
    """Bytes and last use."""
    total, used = 0, 0.0
    with suppress(OSError):
        for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
            its = each.lstat()
            total += its.st_size
            used = max(used, its.st_mtime, its.st_atime)
    return total, used


def _discard(path: Path) -> bool:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)  # of a private directory, and named by a hash
        else:
            path.unlink()
        return True
    return False
