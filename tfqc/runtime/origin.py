"""Where a loaded model comes from: a directory that may hold another model by now, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfqc.runtime.files import MANIFEST


@dataclass(frozen=True)
class Origin:
    """A directory, how a model is loaded from it, and the SHA-256 of its manifest, which holds those of its files."""

    load: Callable[[str], Any]
    directory: str
    digest: str

    @classmethod
    def of(cls, load: Callable[[str], Any], directory: Path) -> Origin:
        """As the directory is now."""
        return cls(load, str(directory), _digest(directory))

    def check(self) -> None:
        """Make sure that what is read from the directory belongs to the model that was loaded.

        Raises:
            ValueError: another model was saved there since, or the directory is gone.
        """
        try:
            now = _digest(Path(self.directory))
        except OSError:
            raise ValueError(
                f"{self.directory} is gone, and this model has to read in it: keep the directory of a model that was "
                "loaded, or load the model from where it is now."
            ) from None
        if now != self.digest:
            raise ValueError(
                f"{self.directory} holds another model than the one that was loaded from it, and that one has to read "
                "in it: save each model to a directory of its own, or load the new one."
            )


def _digest(directory: Path) -> str:
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()
