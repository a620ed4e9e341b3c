"""What long computations gave, in a working directory: a command that was stopped goes on behind the last of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, tensors_hash, write_tensors


class Result:
    """The tensors that one of them gave: codes of a layer, of a block.

    Args:
        directory: where they are kept; None = nowhere.
        kind: what the file's name begins with.
        how: the method with its settings.
        given: what it was given.
    """

    def __init__(self, directory: Path | None, kind: str, how: str, given: Mapping[str, Tensor]) -> None:
        self._path = None
        if directory is not None:
            key = hashlib.sha256(f"{how}\n{tensors_hash(given.items())}".encode()).hexdigest()[:32]
            self._path = directory / f"{kind}-{key}.safetensors"

    def read(self) -> dict[str, Tensor] | None:
        """Tensors by name as they were written; None if they are not there, or broken."""
        if self._path is None:
            return None
        try:
            tensors, metadata = read_tensors(self._path, CalibrationError)
        except CalibrationError:
            return None
        return tensors if metadata == {"sha256": tensors_hash(sorted(tensors.items()))} else None

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep them."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path, tensors, {"sha256": tensors_hash(sorted(tensors.items()))})
