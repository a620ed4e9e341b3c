"""Built kernels, kept in the user's cache by the hash of all that they are made of."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def cache_directory() -> Path:
    """Where built kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfqc" / "kernels"


def kept(key: Sequence[str], suffix: str, make: Callable[[Path], None]) -> Path:
    """A file of the cache; if it is not there, `make` writes it elsewhere and it is renamed, so several may make it.

    `make` may use the directory of the path that it is given.
    """
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24] + suffix
    file = cache_directory() / name
    if not file.exists():
        file = _writable(file.parent) / name
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            part = Path(work, name)
            make(part)
            os.replace(part, file)
    return file


def _writable(wanted: Path) -> Path:
    """The directory; where nothing can be written to it, one of this process's own."""
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=wanted):
            return wanted
    except OSError:
        return Path(_own_directory().name)


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    """Kept as long as the process lives."""
    return tempfile.TemporaryDirectory(prefix="tfqc-kernels-")
