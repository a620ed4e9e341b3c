"""Worlds: values for all symbols of a program at once, in which types are tried.

Symbols have values that no two share and that have no common factors beyond those of the example that was captured,
so that shapes do not agree by accident; and where one value is all that differs, another world has another.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from tfqc.errors import IRError
from tfqc.ir.data import ROWS, ProgramData
from tfqc.ir.dims import holds

World = tuple[tuple[str, int], ...]

_PRIMES = (3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73)


def worlds_of(program: ProgramData, *, rows_apart: bool = False) -> tuple[World, ...]:
    """Three worlds in which types are compared; one, of no values, for a program without symbols.

    A symbol of rows (`R`) counts one row, or one for each entry of the batch. It is B here, so that a value of which
    there is one for all entries may be declared as one for each; with `rows_apart` it is 1 in one of the worlds.
    """
    return _distinct(tuple(sorted(program.symbols.items())), program.guards, rows_apart, _fixed(program))


def _fixed(program: ProgramData) -> int | None:
    """How many images a call has, where the model's code fixes that."""
    return program.batch if isinstance(program.batch, int) else None


@functools.lru_cache(maxsize=256)
def _distinct(symbols: World, guards: tuple[str, ...], rows_apart: bool, fixed: int | None) -> tuple[World, ...]:
    base = dict(symbols)
    names = [s for s in base if s != ROWS]
    if not names:
        counts = (1, 3) if fixed is None else (1, fixed) if rows_apart else (fixed,)
        return tuple(tuple((name, rows) for name in base) for rows in (counts if base else (1,)))
    found: list[World] = []
    for turn in range(3):
        world: dict[str, int] = {}
        for place, name in enumerate(names):
            # The batch is any number; of other sizes the model may ask that they are even, as in the example.
            unit = 1 if name == "B" else base[name]
            others = {k: v for k, v in base.items() if k != name and k != ROWS}
            sizes = (unit * m for m in _multipliers(turn, turn * len(names) + place))
            world[name] = next((v for v in sizes if _allowed(guards, others | {name: v})), base[name])
        if not _allowed(guards, world):
            world = {k: v for k, v in base.items() if k != ROWS}
        if ROWS in base:
            world[ROWS] = 1 if turn == 1 and rows_apart else world.get("B", fixed or 1 + turn)
        found.append(tuple(sorted(world.items())))
    return tuple(found)


def _multipliers(turn: int, start: int) -> Iterator[int]:
    """Primes, from another one for each symbol and world; where guards allow none, double and single in turn."""
    yield from itertools.islice(itertools.cycle(_PRIMES), start, start + len(_PRIMES))
    yield from (1, 2) if turn == 1 else (2, 1)


def _allowed(guards: Sequence[str], world: dict[str, int]) -> bool:
    try:
        return all(holds(guard, world) for guard in guards)
    except IRError:  # a guard over a symbol that the program has no example of
        return True


def more_worlds(program: ProgramData, symbols: Sequence[str]) -> tuple[World, ...]:
    """Worlds enough to tell polynomials in the symbols apart, up to degree 3: a grid of small multiples."""
    base = {k: (1 if k == "B" else v) for k, v in program.symbols.items()}
    varied = [s for s in symbols if s != ROWS][:4]
    steps = itertools.product(range(1, 6), repeat=len(varied))
    found: list[World] = []
    for step in itertools.islice((s for s in steps if sum(s) <= len(s) + 4), 80):
        world = {**base, **{s: base[s] * m for s, m in zip(varied, step, strict=True)}}
        for rows in {1, world.get("B", _fixed(program) or 1)} if ROWS in base else {0}:
            if _allowed(program.guards, world):
                found.append(tuple(sorted({**world, **({ROWS: rows} if rows else {})}.items())))
    return tuple(found)
