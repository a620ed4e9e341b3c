"""Dimensions: numbers, and integer arithmetic over symbols as text; guards: comparisons of such arithmetic.

Text comes from strangers, so what is understood is a list: `+ - * // % **` over whole numbers and symbols, up to
lengths, depths and values that no model needs.
"""

from __future__ import annotations

import ast
import functools
import itertools
import operator
import re
import warnings
from collections.abc import Callable, Mapping

from tfqc.errors import IRError

Dim = int | str

# Symbols have no small letters, so that the `x` between dimensions ends them.
SYMBOL = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
MAX = 2**63 - 1  # of dimensions, of numbers of elements, of all values on the way to them
_LONGEST, _DEEPEST, _HIGHEST_POWER = 1000, 100, 8
_CHARACTERS = re.compile(r"[A-Z0-9_ +\-*/%()]*")
_COMPARISON_CHARACTERS = re.compile(r"[A-Za-z0-9_ +\-*/%()=!<>,]*")

_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


def evaluate(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The value of a dimension, given one for each symbol.

    Raises:
        IRError: it is no integer arithmetic, names another symbol, divides by zero, or leaves 64 bits on the way.
    """
    return dim if isinstance(dim, int) else _value(_expression(dim), dim, symbols)


def check_dim(dim: str) -> None:
    """Refuse text that is no integer arithmetic, whatever the symbols are."""
    _expression(dim)


def symbols_in(dim: str) -> set[str]:
    """Names of the symbols of an expression."""
    return set(SYMBOL.findall(dim))


def holds(guard: str, symbols: Mapping[str, int]) -> bool:
    """Whether a guard such as `H % 2 == 0` or `4 <= H` is true for values of the symbols.

    Raises:
        IRError: it is no comparison of integer arithmetic over these symbols.
    """
    tree = _comparison(guard)
    values = [_value(side, guard, symbols) for side in (tree.left, *tree.comparators)]
    pairs = itertools.pairwise(values)
    return all(_COMPARISONS[type(op)](a, b) for op, (a, b) in zip(tree.ops, pairs, strict=True))


def _value(node: ast.expr, text: str, symbols: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int() as value):
            pass
        case ast.Name(id=name) if name in symbols:
            value = symbols[name]
        case ast.BinOp(left=left, op=op, right=right):
            a, b = _value(left, text, symbols), _value(right, text, symbols)
            if isinstance(op, ast.Pow) and not 0 <= b <= _HIGHEST_POWER:
                raise IRError(f"{text!r} has a power of {b}: 0 to {_HIGHEST_POWER} are understood.")
            try:
                value = _ARITHMETIC[type(op)](a, b)
            except ZeroDivisionError as error:
                raise IRError(f"Dimension {text!r} divides by zero for {dict(symbols)}.") from error
        case ast.UnaryOp(operand=operand):
            value = -_value(operand, text, symbols)
        case _:
            raise IRError(f"Dimension {text!r} is not integer arithmetic over {sorted(symbols) or 'no symbols'}.")
    if abs(value) > MAX:
        raise IRError(f"{text!r} is more than 64 bits hold, for {dict(symbols)}.")
    return value


@functools.lru_cache(maxsize=16384)
def _expression(dim: str) -> ast.expr:
    tree = _parsed(dim, _CHARACTERS, "integer arithmetic")
    _only_arithmetic(tree, dim)
    return tree


@functools.lru_cache(maxsize=1024)
def _comparison(guard: str) -> ast.Compare:
    tree = _parsed(guard, _COMPARISON_CHARACTERS, "a comparison of integer arithmetic")
    if not isinstance(tree, ast.Compare) or any(type(op) not in _COMPARISONS for op in tree.ops):
        raise IRError(f"Guard {guard!r} is not a comparison of integer arithmetic, such as 'H % 2 == 0'.")
    for side in (tree.left, *tree.comparators):
        _only_arithmetic(side, guard)
    return tree


def _parsed(text: str, characters: re.Pattern[str], what: str) -> ast.expr:
    if len(text) > _LONGEST or not characters.fullmatch(text):
        raise IRError(f"{_cut(text)!r} is not {what}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise IRError(f"{_cut(text)!r} is not {what}: {getattr(error, 'msg', 'it is too deep')}.") from error


def _only_arithmetic(tree: ast.expr, text: str) -> None:
    level = [tree]
    for _ in range(_DEEPEST):
        below: list[ast.expr] = []
        for node in level:
            match node:
                case ast.Constant(value=int()) | ast.Name():
                    pass
                case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                    below += [left, right]
                case ast.UnaryOp(op=ast.USub(), operand=operand):
                    below.append(operand)
                case _:
                    raise IRError(f"Dimension {_cut(text)!r} is not integer arithmetic.")
        level = below
    if level:
        raise IRError(f"{_cut(text)!r} is nested deeper than {_DEEPEST} levels.")


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
