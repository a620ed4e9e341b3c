"""A file of the cache, made if it is not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tfqc.runtime.cache import hash_of, locked, private_directory, sync, used_now, whole, working_directory
from tfqc.runtime.pruning import prune_at_times


def kept(key: Sequence[str], suffix: str, make: Callable[[Path], None], kind: str = "kernels") -> Path:
    """A file of the cache; if it is not there or broken, `make` writes it elsewhere and it is renamed, so several may
    make it at once.

    `make` may use the directory of the path that it is given.
    """
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24]
    directory = private_directory(kind)
    if (found := whole(directory, name, suffix)) is None:
        with working_directory(directory) as work:
            part = work / f"{name}{suffix}"
            make(part)
            sync(part)
            with locked(directory):  # another process may have been faster
                if (found := whole(directory, name, suffix)) is None:
                    found = directory / f"{name}-{hash_of(part)}{suffix}"
                    os.replace(part, found)
                    sync(directory)
        prune_at_times()
    used_now(found)
    return found
