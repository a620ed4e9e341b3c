"""Progress as pipelines of diffusers show it: bars of tqdm, in a notebook, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm


class Bars:
    """The `Progress` protocol of `tfqc.progress`: a bar for each job, where somebody watches.

    Args:
        config: what `pipe.set_progress_bar_config` was told: it speaks for these bars, too.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config: dict[str, Any] = {"disable": None, **config}  # None: not where stderr is a file

    def track(self, items: Any, what: str, total: int | None = None) -> Iterator[Any]:
        """Iterate over `items`, showing progress."""
        options: dict[str, Any] = {"desc": what, **self._config}
        return iter(tqdm(items, total=total, **options))

    def say(self, text: str) -> None:
        """One line for the user: a bar without a length."""
        options: dict[str, Any] = {**self._config, "desc": text, "bar_format": "{desc}"}
        tqdm(total=0, **options).close()
