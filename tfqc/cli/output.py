"""What commands print, and how they end.

Results go to stdout (with `--json`: one JSON value and nothing else), progress, notes and errors to stderr. Exit codes:
0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import typer

from tfqc.errors import TfqcError

P = ParamSpec("P")
R = TypeVar("R")
INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does: what it had begun to write is taken away."""


def show(value: Any, text: str, as_json: bool) -> None:
    """A command's result: `value` as JSON for machines, or `text` for people."""
    print(json.dumps(value, indent=1) if as_json else text)


def note(text: str) -> None:
    """A dimmed line on stderr."""
    _to_stderr(text, "dim")


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command's exceptions end it as this module says. Its option `as_json` decides how errors look.

    Notes on an exception (`add_note`) are printed dimmed below it. `TFQC_DEBUG=1` lets every exception through.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with _terminable():
                return command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("TFQC_DEBUG"):
                raise
            _fail(error, bool(kwargs.get("as_json")))

    return run


@contextmanager
def _terminable() -> Generator[None]:
    """Where nobody else has an eye on SIGTERM, it is an exception."""

    def terminate(_number: int, _frame: Any) -> NoReturn:
        raise Terminated

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _fail(error: BaseException, as_json: bool) -> NoReturn:
    notes: Sequence[str] = getattr(error, "__notes__", [])
    code = 1
    match error:
        case typer.Exit() | typer.Abort() | typer.BadParameter():
            raise error
        case BrokenPipeError():  # the reader of stdout has gone (`tfqc opt ... | head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(code) from None
        case KeyboardInterrupt():
            # What was kept is part of the sentence: it is what the user wants to know.
            message = " ".join(["Interrupted.", *(notes or ["Nothing was written."])])
            notes, code = [], TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        case TfqcError():
            message = str(error)
        case OSError() if error.filename is not None:
            message = f"{error.filename}: {error.strerror}."
        case _:
            message = _unexpected(error)
    if as_json:
        show({"error": message, "notes": list(notes)}, "", as_json)
    else:
        _to_stderr(message, "red")
        for line in notes:
            note(line)
    raise typer.Exit(code) from None


def _unexpected(error: BaseException) -> str:
    """One sentence for an exception that nobody raised on purpose."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = next(iter(str(error).splitlines()), "")
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"Unexpected {type(error).__name__} at {place}: {first.rstrip('.')}. Set TFQC_DEBUG=1 to see the traceback."


def _to_stderr(text: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style))
