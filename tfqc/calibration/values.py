"""Values of all calls of a model at once, of which there may be more than fits into memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tfqc.files.spill import spilled


class Values:
    """Values by call and name; tensors for which there is no room lie in files (`tfqc.files.spill`)."""

    def __init__(self) -> None:
        self._values: dict[tuple[int, str], Any] = {}

    def put(self, call: int, values: Mapping[str, Any]) -> None:
        """Keep values of a call, in the place of what has their names."""
        for name, value in values.items():
            held = [each for each in self._values.values() if isinstance(each, Tensor)]
            self._values[call, name] = spilled(value, held) if isinstance(value, Tensor) else value

    def read(self, call: int, names: Iterable[str]) -> dict[str, Any]:
        """Values of a call."""
        return {name: self._values[call, name] for name in names}

    def keep(self, names: set[str]) -> None:
        """Let go of all others."""
        for key in [key for key in self._values if key[1] not in names]:
            del self._values[key]
