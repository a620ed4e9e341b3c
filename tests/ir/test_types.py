"""Types and their text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import IRError
from tfqc.ir.types import (
    DTYPES,
    Dim,
    ScalarType,
    TensorType,
    TupleType,
    Type,
    evaluate,
    parse_type,
    symbols_of,
)

SYMBOLS = st.sampled_from(["B", "H", "W", "S0", "S12", "LONG_NAME"])
EXPRESSIONS = st.recursive(
    st.one_of(SYMBOLS, st.integers(1, 99).map(str)),
    lambda inner: st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//"]), inner),
    max_leaves=5,
)
DIMS: st.SearchStrategy[Dim] = st.one_of(
    st.integers(0, 10**6), SYMBOLS, st.builds("2*{} + {}".format, EXPRESSIONS, EXPRESSIONS)
)
TENSORS = st.builds(
    TensorType, st.sampled_from(sorted(DTYPES.values(), key=str)), st.lists(DIMS, max_size=5).map(tuple)
)
SCALARS = st.one_of(
    st.builds(ScalarType, st.just("int"), st.one_of(st.none(), EXPRESSIONS)),
    st.sampled_from(["float", "bool", "none"]).map(ScalarType),
)
TYPES: st.SearchStrategy[Type] = st.recursive(
    st.one_of(TENSORS, SCALARS),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: TupleType(tuple(items))),
    max_leaves=4,
)


@given(TYPES)
def test_text_gives_the_same_type(type_: Type) -> None:
    assert parse_type(str(type_)) == type_


@given(st.text("Bx()i3f<>, 21o+*-/lnate", max_size=14))
def test_any_text_is_a_type_or_an_error(text: str) -> None:
    try:
        type_ = parse_type(text)
    except IRError:
        return
    assert parse_type(str(type_)) == type_


@given(EXPRESSIONS, st.integers(1, 50), st.integers(1, 50))
def test_expressions_mean_what_python_means(expression: str, batch: int, height: int) -> None:
    symbols = {"B": batch, "H": height, "W": 3, "S0": 4, "S12": 5, "LONG_NAME": 6}
    try:
        want = eval(expression, dict(symbols))
    except ZeroDivisionError:
        with pytest.raises(IRError, match="divides by zero"):
            evaluate(expression, symbols)
        return
    assert evaluate(expression, symbols) == want


def test_reading_of_a_shape() -> None:
    """Every dimension apart: not one symbol `Bx4x16`."""
    assert parse_type("Bx4x(2*B + 1)x16xf32") == TensorType(torch.float32, ("B", 4, "2*B + 1", 16))
    assert parse_type("bool") == TensorType(torch.bool, ())
    assert parse_type("bool<>") == ScalarType("bool")
    assert parse_type("int<B>") == ScalarType("int", "B")
    assert parse_type("(Bx3xf32, (2*B)xi64, none)").items[2] == ScalarType("none")  # type: ignore[union-attr]


def test_symbols() -> None:
    assert symbols_of(parse_type("(Bx4xf32, int<2*H>, ((W//2) + 1)xf32, 3xi8)")) == {"B", "H", "W"}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "does not begin with a type"),
        ("Bx4", "does not begin with a type"),
        ("f33", "does not begin with a type"),
        ("bx4xf32", "does not begin with a type"),
        ("Bx4xf32 ", "is not a type: ' ' is left over"),
        ("(f32", "does not begin with a type"),
        ("(f32 f32)", "does not begin with a type"),
        ("(2*)xf32", "is not integer arithmetic"),
    ],
)
def test_malformed(text: str, sentence: str) -> None:
    with pytest.raises(IRError, match=sentence):
        parse_type(text)


@pytest.mark.parametrize("expression", ["X", "B.real", "f(B)", "B / 2", "'a'", "B if B else 1", "1.5", "("])
def test_only_integer_arithmetic_is_evaluated(expression: str) -> None:
    with pytest.raises(IRError, match="is not integer arithmetic"):
        evaluate(expression, {"B": 2})
