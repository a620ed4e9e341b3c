"""Expressions over sizes, from sympy as torch.export has them to integer arithmetic as the IR says it."""

from __future__ import annotations

from typing import Any

import sympy
from torch.utils._sympy.functions import FloatTrueDiv, FloorDiv, IntTrueDiv, Mod, PythonMod, ToFloat, TruncToInt

_COMPARISONS = {
    sympy.Eq: "==", sympy.Ne: "!=", sympy.StrictLessThan: "<", sympy.LessThan: "<=", sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}  # fmt: skip


class NoArithmetic(Exception):
    """The expression is no integer arithmetic; its text is the argument."""


def simplified(expression: Any) -> Any:
    """Without rounding, and without detours over floats, that change nothing: (6*B) // B is 6, int(H * 0.5) is H // 2.

    Symbols are to be positive integers.
    """
    expression = sympy.sympify(expression).replace(lambda e: e.is_Float, _fraction)
    expression = expression.replace(ToFloat, lambda number: number)
    expression = expression.replace(TruncToInt, _truncated)
    expression = expression.replace(IntTrueDiv, _quotient).replace(FloatTrueDiv, _quotient)
    expression = expression.replace(TruncToInt, _truncated)
    expression = expression.replace(FloorDiv, _floored)
    return expression.replace(Mod, _remainder).replace(PythonMod, _remainder)


def _fraction(number: Any) -> Any:
    """A float of few binary digits as a fraction: sums and products of sizes with it are exact."""
    fraction: Any = sympy.Rational(number)
    return fraction if _few_digits(fraction.q) else number


def _few_digits(divisor: Any) -> bool:
    return divisor in [2**digits for digits in range(21)]


def _quotient(dividend: Any, divisor: Any) -> Any:
    return dividend / divisor if _few_digits(divisor) else FloatTrueDiv(dividend, divisor)


def _truncated(number: Any) -> Any:
    """int(a / b): one rounding takes a quotient of sizes across no whole number."""
    if isinstance(number, (IntTrueDiv, FloatTrueDiv)):
        return _floored(*number.args)
    dividend, divisor = sympy.fraction(sympy.together(number))
    return _floored(dividend, divisor) if dividend.is_integer else TruncToInt(number)


def _floored(dividend: Any, divisor: Any) -> Any:
    quotient = sympy.cancel(dividend / divisor)
    return quotient if quotient.is_integer else FloorDiv(dividend, divisor)


def _remainder(dividend: Any, divisor: Any) -> Any:
    return sympy.Integer(0) if sympy.cancel(dividend / divisor).is_integer else Mod(dividend, divisor)


def written(expression: Any) -> str:
    """`2*H + 1`, `(H*W) // 4`.

    Raises:
        NoArithmetic: it takes more than +, -, *, // and %.
    """
    args = expression.args
    if expression.is_Integer or expression.is_Symbol:
        return str(expression)
    if expression.is_Add:
        first, *others = expression.as_ordered_terms()
        return written(first) + "".join(
            f" - {_operand(-term)}" if term.could_extract_minus_sign() else f" + {_operand(term)}" for term in others
        )
    if expression.is_Mul and args[0].is_Integer and args[0] < 0:
        return f"-{_operand(-expression)}"
    if expression.is_Mul:
        return "*".join(map(_operand, expression.as_ordered_factors()))
    if expression.is_Pow and args[1].is_Integer and args[1] > 0:
        return "*".join([_operand(args[0])] * int(args[1]))
    if isinstance(expression, FloorDiv):
        return " // ".join(map(_operand, args))
    if isinstance(expression, (Mod, PythonMod)):
        return " % ".join(map(_operand, args))
    raise NoArithmetic(str(expression))


def _operand(expression: Any) -> str:
    text = written(expression)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def comparison(relation: Any) -> str:
    """`H % 2 == 0`, of a relation of two expressions.

    Raises:
        NoArithmetic: it is none, or its sides are no integer arithmetic.
    """
    sign = _COMPARISONS.get(relation.func)
    if sign is None:
        raise NoArithmetic(str(relation))
    factor = sympy.ilcm(*(sympy.fraction(sympy.together(side))[1] for side in relation.args))
    left, right = (sympy.expand(factor * side) for side in relation.args)
    return f"{written(left)} {sign} {written(right)}"
