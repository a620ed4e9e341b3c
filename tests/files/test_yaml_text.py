"""YAML from outside: plain data with the lines of its keys, and nothing that grows, runs or means two things."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import RecipeError, TfqcError
from tfqc.files.yaml_text import parse_yaml

BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 3", {"a": 3}),
        ("a: '3'", {"a": "3"}),
        ("a: 1e-5", {"a": 1e-5}),
        ("a: 010", {"a": 10}),
        ("a: [true, false, null, ~, ]", {"a": [True, False, None, None]}),
        ("a: [yes, NO, on, 1:30, 2001-01-01, 0x10, .inf, 1e999]",
         {"a": ["yes", "NO", "on", "1:30", "2001-01-01", "0x10", ".inf", "1e999"]}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ("", None),
        ("{a: {b: [1, {c: 2}]}}", {"a": {"b": [1, {"c": 2}]}}),
        ("<<: 1", {"<<": 1}),
    ],
)  # fmt: skip
def test_values(text: str, value: Any) -> None:
    found = parse_yaml(text, "x", RecipeError).value
    assert found == value
    assert repr(found) == repr(value)  # 1 is no True


def test_lines() -> None:
    lines = parse_yaml("# one\na: 1\nb:\n  c: 2\n  d:\n  - e: 3\n", "x", RecipeError).lines
    assert (lines[("a",)], lines[("b",)], lines[("b", "c")], lines[("b", "d", 0, "e")]) == (2, 3, 4, 6)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "x, line 1 has an anchor or an alias: write the value out."),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", "x, line 2 has a tag: leave it out."),
        ("a: !!int 3", "x, line 1 has a tag"),
        ("[" * 40 + "]" * 40, "x, line 1 has more than 16 levels."),
        ("a: 1\na: 2", "x, line 2 has the key 'a' a second time."),
        ("1: 2", "x, line 1 has a key that is no text."),
        ("[a]: 2", "x, line 1 has a key that is no text."),
        ("a: [", "x, line 1 is no YAML: "),
        ("a: 1\n--- \nb: 2", "x, line 2 is no YAML: "),
        ("a: '\\ud800'\nb: \"\\ud800\"", "x, line 2 has half a character."),
        ("a: \x00", "x is no YAML: "),
        ("a: " + "b" * (1 << 18), "characters"),
    ],
)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_yaml(text, "x", RecipeError)
    assert said in str(error.value)


@given(st.text(alphabet="abc:-[]{},&*!|>'\"\\#% \n\t01.", max_size=60))
def test_any_text_is_data_or_an_error_of_ours(text: str) -> None:
    try:
        parse_yaml(text, "x", RecipeError)
    except TfqcError as error:
        assert str(error).startswith("x")
