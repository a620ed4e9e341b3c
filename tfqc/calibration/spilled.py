"""Values that wait on disk: of all calls at once, they are more than fits into memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Spilled:
    """Values by call and name; tensors lie in files, which are mapped, and gone when this is closed.

    Args:
        directory: where a directory for them is made; the system's for temporary files by default.
    """

    def __init__(self, directory: Path | None = None) -> None:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self._own = tempfile.TemporaryDirectory(prefix="values-", dir=directory)
        self._values: dict[tuple[int, str], Any] = {}
        self._number = 0

    def __enter__(self) -> Spilled:
        return self

    def __exit__(self, *_: object) -> None:
        self._values.clear()
        self._own.cleanup()

    def put(self, call: int, values: Mapping[str, Any]) -> None:
        """Keep values of a call, in the place of what has their names."""
        for name, value in values.items():
            self._values[call, name] = self._kept(value) if isinstance(value, Tensor) else value

    def read(self, call: int, names: Iterable[str]) -> dict[str, Any]:
        """Values of a call."""
        return {name: self._values[call, name] for name in names}

    def keep(self, names: set[str]) -> None:
        """Let go of all others."""
        for key in [key for key in self._values if key[1] not in names]:
            del self._values[key]

    def _kept(self, value: Tensor) -> Tensor:
        if value.numel() == 0:
            return value
        path = Path(self._own.name) / str(self._number)
        self._number += 1
        made = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        made.copy_(value)
        path.unlink()  # the mapping holds it, and nothing else
        return made
