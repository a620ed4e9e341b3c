"""The polynomial in symbols that takes given values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

_DEGREE = 3
Monomial = tuple[str, ...]  # ("B", "B", "H") is B*B*H


def fitted(symbols: Sequence[str], worlds: Sequence[Mapping[str, int]], values: Sequence[int]) -> str | None:
    """`2*B*H + -8`, of whole coefficients and degree 3 at most; None if there is none, or several."""
    for degree in range(1, _DEGREE + 1):
        monomials = [m for d in range(degree, -1, -1) for m in itertools.combinations_with_replacement(symbols, d)]
        if len(worlds) < len(monomials) + (degree > 1):  # guards may leave two sizes, through which one line goes
            return None
        rows = [[Fraction(math.prod(world[s] for s in m)) for m in monomials] for world in worlds]
        found = _solve([[*row, Fraction(v)] for row, v in zip(rows, values, strict=True)], len(monomials))
        if found is not None and all(c.denominator == 1 for c in found):
            return _text(monomials, [int(c) for c in found])
    return None


def _solve(rows: list[list[Fraction]], unknowns: int) -> list[Fraction] | None:
    """Gauss and Jordan, exactly; None if nothing, or more than one thing, solves all rows."""
    for column in range(unknowns):
        pivot = next((r for r in range(column, len(rows)) if rows[r][column]), None)
        if pivot is None:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        head = [x / rows[column][column] for x in rows[column]]
        rows[column] = head
        for r, row in enumerate(rows):
            if r != column and row[column]:
                rows[r] = [a - row[column] * b for a, b in zip(row, head, strict=True)]
    return None if any(row[-1] for row in rows[unknowns:]) else [rows[i][-1] for i in range(unknowns)]


def _text(monomials: Sequence[Monomial], coefficients: Sequence[int]) -> str:
    terms: list[str] = []
    for monomial, coefficient in zip(monomials, coefficients, strict=True):
        if coefficient:
            factors = [*([] if coefficient == 1 and monomial else [str(coefficient)]), *monomial]
            terms.append("*".join(factors))
    return " + ".join(terms) or "0"
