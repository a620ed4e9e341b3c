"""Directories that live as long as an object."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path


class Temporary:
    """A directory that lives as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tfqc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
