"""torch.export without the graphs that it prints where it fails: tfqc says what failed, at which line."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Generator
from typing import Any

_GRAPH = "def forward(self, arg0_1"  # how a graph of torch.export begins that it prints to stderr
_LOGGER = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class _WithoutGraphs:
    """A stream that leaves graphs out."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._behind_graph = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what is no graph."""
        behind, self._behind_graph = self._behind_graph, _GRAPH in text
        left_out = self._behind_graph or (behind and text == "\n")
        return len(text) if left_out else self._stream.write(text)


@contextlib.contextmanager
def hushed() -> Generator[None]:
    """What anybody else writes to stderr is written."""
    level = _LOGGER.level
    _LOGGER.setLevel(max(level, logging.ERROR))
    try:
        stream: Any = _WithoutGraphs(sys.stderr)
        with contextlib.redirect_stderr(stream):
            yield
    finally:
        _LOGGER.setLevel(level)
