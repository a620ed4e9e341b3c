"""Observations on disk, in a working directory, for a command that was stopped and for others of the same model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tfqc.calibration.observers.base import Observer, State
from tfqc.errors import CalibrationError
from tfqc.files.storage import read_tensors, tensors_hash, write_tensors

Wish = tuple[str, str, str]  # key of what was run, name of the value, key of the observer
MOST = 1 << 30  # bytes: what is larger is sooner measured again than read


class Kept:
    """Observations of one model on one set of trajectories.

    Args:
        directory: where they are.
        key: of the trajectories.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._directory, self._key = directory, key

    def read(self, wanted: Mapping[Wish, Observer[Any]]) -> tuple[dict[Wish, Observer[Any]], int]:
        """Observers whose results are here, as they were written, and the bytes of activations that there were."""
        found: dict[Wish, Observer[Any]] = {}
        activations = 0
        for path in sorted(self._directory.glob(f"observed-{self._key}-*.safetensors")):
            if wanted.keys() <= found.keys():
                break
            try:
                tensors, metadata = read_tensors(path, CalibrationError)
            except CalibrationError:
                continue
            text = metadata.get("observations", "")
            if metadata.get("sha256") != _hash(tensors, text):
                continue
            kept = json.loads(text)
            if not {"activations", "states"} <= kept.keys():  # as another version wrote it
                continue
            activations = kept["activations"]
            for number, (value, key, facts) in enumerate(kept["states"]):
                if (observer := wanted.get((self._key, value, key))) is not None:
                    prefix = f"{number}."
                    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                    found[self._key, value, key] = type(observer).from_state(State(own, facts))
        return found, activations

    def write(self, observers: Mapping[Wish, Observer[Any]], activations: int) -> None:
        """Keep them, unless they are more than `MOST` bytes."""
        states = {wish: observer.state() for wish, observer in observers.items()}
        if sum(tensor.nbytes for state in states.values() for tensor in state.tensors.values()) > MOST:
            return
        tensors = {f"{i}.{n}": t for i, state in enumerate(states.values()) for n, t in state.tensors.items()}
        facts = [[value, key, state.facts] for (_, value, key), state in states.items()]
        text = json.dumps({"activations": activations, "states": facts})
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        metadata = {"observations": text, "sha256": _hash(tensors, text)}
        write_tensors(self._directory / f"observed-{self._key}-{name}.safetensors", tensors, metadata)


def _hash(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256((tensors_hash(tensors.items()) + text).encode()).hexdigest()
