"""Rounded weights on disk, in a working directory: a command that was stopped goes on behind the last layer."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, tensors_hash, write_tensors


class Rounded:
    """The codes of one layer.

    Args:
        directory: where they are kept; None = nowhere.
        how: the method with its settings, and what it rounds to.
        given: what the codes are made of: the weight, the second moments of its inputs, scales and zero points.
    """

    def __init__(self, directory: Path | None, how: str, given: dict[str, Tensor]) -> None:
        self._path = None
        if directory is not None:
            key = hashlib.sha256(f"{how}\n{tensors_hash(given.items())}".encode()).hexdigest()[:32]
            self._path = directory / f"rounded-{key}.safetensors"

    def read(self) -> Tensor | None:
        """The codes as they were written; None if they are not there, or broken."""
        if self._path is None:
            return None
        try:
            tensors, metadata = read_tensors(self._path, CalibrationError)
        except CalibrationError:
            return None
        return tensors.get("codes") if metadata == {"sha256": tensors_hash(tensors.items())} else None

    def write(self, codes: Tensor) -> None:
        """Keep them."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path, {"codes": codes}, {"sha256": tensors_hash([("codes", codes)])})
