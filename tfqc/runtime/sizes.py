"""Sizes of dimensions as numbers, symbols and integer arithmetic over symbols, and what has to hold of them."""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Dim = int | str
Evaluate = Callable[[Mapping[str, int]], int]

_OPERATIONS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


@functools.cache
def arithmetic(text: str) -> Evaluate:
    """A function of the symbols for `2*H + 1`, or for a comparison such as `H % 2 == 0`.

    Raises:
        ValueError: the text is anything else.
    """

    def walk(node: ast.expr) -> Evaluate:
        match node:
            case ast.Constant(value=int() as value):
                return lambda _: value
            case ast.Name(id=name):
                return lambda symbols: symbols[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                inner = walk(operand)
                return lambda symbols: -inner(symbols)
            case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
                if (apply := _OPERATIONS.get(type(op))) is not None:
                    a, b = walk(left), walk(right)
                    return lambda symbols: apply(a(symbols), b(symbols))
            case _:
                pass
        raise ValueError(f"{text!r} is no integer arithmetic.")

    try:
        return walk(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{text!r} is no integer arithmetic.") from error


@functools.cache
def symbols_in(text: str) -> frozenset[str]:
    """The symbols of an expression."""
    return frozenset(re.findall(r"[A-Za-z_]\w*", text))


def solve(dim: Dim, size: int, known: dict[str, int]) -> bool:
    """True if a dimension can have a size; a symbol that was not known is, behind it.

    An expression with one unknown symbol is solved where it is linear; with several it waits (and is true).
    """
    if isinstance(dim, int):
        return dim == size
    if dim.isidentifier():
        return known.setdefault(dim, size) == size
    evaluate = arithmetic(dim)
    unknown = symbols_in(dim) - known.keys()
    if not unknown:
        return evaluate(known) == size
    if len(unknown) > 1:
        return True
    (symbol,) = unknown
    at_zero, at_one = (evaluate({**known, symbol: value}) for value in (0, 1))
    if at_one == at_zero:
        return True
    value = (size - at_zero) // (at_one - at_zero)
    known[symbol] = value
    return value > 0 and evaluate(known) == size


def letters(rank: int) -> str:
    """What the dimensions of a sample are called: an image's, a video's (F frames), a sequence's; else by number."""
    return {3: "BSC", 4: "BCHW", 5: "BCFHW"}.get(rank, "BCDEFGHIJKLMNOPQRSTUVWXYZ"[:rank])


def written(shape: Sequence[Dim]) -> str:
    """`Bx4x64x64`."""
    if not shape:
        return "a scalar"
    return "x".join(str(d) if isinstance(d, int) or d.isidentifier() else f"({d})" for d in shape)


def meaning(guard: str) -> str:
    """A guard as a person says it: `H % 2 == 0` is `H even`."""
    even = re.fullmatch(r"(?:Mod\((\w+), (\d+)\)|(\w+) % (\d+)) == 0", guard)
    if even is None:
        return guard
    symbol, factor = even[1] or even[3], even[2] or even[4]
    return f"{symbol} even" if factor == "2" else f"{symbol} a multiple of {factor}"
