"""Tables and numbers as text for a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], right: Sequence[int] = ()) -> str:
    """Columns as wide as they need to be, the last broken to the terminal's width; `right` hold numbers."""
    align = ["right" if i in right else "left" for i in range(len(headers))]
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    others = sum(max(len(row[i]) for row in [headers, *cells]) + 2 for i in range(len(headers) - 1))
    last = max(30, shutil.get_terminal_size((200, 24)).columns - others)
    return tabulate(
        cells,
        headers,
        tablefmt="simple",
        disable_numparse=True,
        colalign=align if cells else None,
        maxcolwidths=[*[None] * (len(headers) - 1), last],
    )


def facts(values: Mapping[str, Any]) -> str:
    """`name  value` lines; empty values are left out."""
    rows = [(name, str(value)) for name, value in values.items() if value not in (None, "", [])]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def section(title: str, body: str) -> str:
    """A title over a block of text."""
    return f"{title}\n{body}\n"


def size(count: int) -> str:
    """Bytes in a unit that leaves three digits: `3.36 MB`."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 1000 or unit == "GB":
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    raise AssertionError


def decibel(value: float | None) -> str:
    """`38.1 dB`; `equal` where nothing differs."""
    from tfqc.report.quality import IDENTICAL

    if value is None:
        return "-"
    return "equal" if value >= IDENTICAL - 1 else f"{value:.1f} dB"


def seconds(value: float) -> str:
    """`1.23 s`, `45 ms`."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
