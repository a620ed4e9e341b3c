"""Showing how far a long job is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol


class Progress(Protocol):
    """Somebody who shows how far a long job is: says what, how far, and how long."""

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`, showing progress."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...


class Silent:
    """No progress is shown."""

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`."""
        del what, total
        yield from items

    def say(self, text: str) -> None:
        """Nothing is shown."""
