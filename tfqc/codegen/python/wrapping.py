"""Lines of generated Python that are no longer than a person reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

WIDTH = 120
_OPEN, _CLOSE = "([{", ")]}"


def signature(name: str, parameters: Sequence[str], returns: str) -> Iterator[str]:
    """`def name(parameters) -> returns:`, over several lines where one would be too long."""
    yield from wrapped(f"def {name}({', '.join(parameters)}) -> {returns}:")


def wrapped(line: str) -> Iterator[str]:
    """A line as it is, or its outermost brackets with as many operands in a line as fit."""
    if len(line) <= WIDTH or (found := _outermost(line)) is None:
        yield line
        return
    start, end, commas = found
    indent = " " * (len(line) - len(line.lstrip()))
    yield line[: start + 1]
    row = f"{indent}    "
    cuts = [start, *commas, end]
    for left, right in pairwise(cuts):
        operand = line[left + 1 : right].strip()
        if row.strip() and len(row) + len(operand) + 1 > WIDTH:
            yield row.rstrip()
            row = f"{indent}    "
        row += f"{operand}, "
    yield row.rstrip().removesuffix(",")
    yield indent + line[end:]


def _outermost(line: str) -> tuple[int, int, list[int]] | None:
    """The first bracket that is opened, where it is closed, and the commas between that are in no other."""
    depth, start, quote, at = 0, -1, "", 0
    commas: list[int] = []
    while at < len(line):
        sign = line[at]
        if quote:
            at += sign == "\\"
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _OPEN:
            start = at if depth == 0 else start
            depth += 1
        elif sign in _CLOSE:
            depth -= 1
            if depth == 0:
                return start, at, commas
        elif sign == "," and depth == 1:
            commas.append(at)
        at += 1
    return None
