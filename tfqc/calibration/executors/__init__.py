"""Where batches of calibration images run: in this process, and later in others through the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Executor(Protocol):
    """Runs a job for each batch. What jobs return can be sent between processes (tensors and JSON)."""

    def run(self, job: Callable[[int], T], batches: int) -> Iterator[T]:
        """`job(0)`, `job(1)` ...: results in the order of batches, wherever and whenever they were run."""
        ...
