"""Progress on stderr: a bar that says what, how far and how long; one line a stage where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tfqc.cli.output import note


class StderrProgress:
    """The `Progress` protocol of `tfqc.passing.base`; leave its context before anything else is printed.

    On a terminal each job has a bar with counts, elapsed and remaining time, and leaves a line with its duration. Where
    stderr is a file or a pipe there is that line alone.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        self._jobs: list[Generator[Any]] = []

    def __enter__(self) -> StderrProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """End jobs that an exception has cut off: their bars would stand in the way of its message."""
        for job in reversed(self._jobs):
            job.close()
        self._jobs.clear()

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`, showing progress."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        job = self._job(items, what, total)
        self._jobs.append(job)
        return job

    def say(self, text: str) -> None:
        """One line for the user."""
        note(text)

    @contextmanager
    def busy(self, what: str) -> Generator[None]:
        """Show that one thing is under way, of which nobody can tell how far it is."""
        job = self.track(range(1), what)
        next(job)
        yield
        next(job, None)

    def _job(self, items: Iterable[Any], what: str, total: int | None) -> Generator[Any]:
        began, done = time.perf_counter(), 0
        try:
            for item in self._with_bar(items, what, total) if self._console.is_terminal else items:
                yield item
                done += 1
        finally:
            counted = f"{done}" if total in (None, done) else f"{done} of {total}"
            note(f"{what}: {counted} in {time.perf_counter() - began:.1f} s")

    def _with_bar(self, items: Iterable[Any], what: str, total: int | None) -> Iterator[Any]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
        )
        with bar:
            yield from bar.track(items, total=total, description=what)
