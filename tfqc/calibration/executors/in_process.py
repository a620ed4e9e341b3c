"""Batches one after another, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class InProcess:
    """The next batch runs when the result of the one before has been taken."""

    def run(self, job: Callable[[int], T], batches: int) -> Iterator[T]:
        """See `tfqc.calibration.executors.Executor`."""
        return map(job, range(batches))
