"""What goes wrong in a kernel, and where."""

from __future__ import annotations


class PtxError(Exception):
    """A kernel does what it must not do, or what this interpreter does not know.

    The text of the error has all of it; `line` is the line of the PTX text, 0 if the launch itself is at fault.
    """

    def __init__(self, message: str, kernel: str = "", line: int = 0, text: str = "", thread: str = "") -> None:
        where = f"{kernel}, line {line}: `{text}`" if line else kernel
        super().__init__(": ".join(part for part in (where, thread, message) if part))
        self.message, self.kernel, self.line, self.thread = message, kernel, line, thread


class FaultError(Exception):
    """The same as an operation sees it, which knows the lane (index in the block) and not the instruction."""

    def __init__(self, message: str, lane: int | None = None) -> None:
        super().__init__(message)
        self.message, self.lane = message, lane
