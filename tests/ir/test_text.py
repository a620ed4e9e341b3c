"""IR text: what is rendered is parsed back to the same program; malformed text is an error with the line."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import first
from tests.models import MODELS, Example
from tests.tiny import tiny
from tfqc.errors import IRError
from tfqc.ir.cursor import Cursor
from tfqc.ir.parse import parse
from tfqc.ir.program import Program
from tfqc.ir.render import render, render_value
from tfqc.ir.verify import verify

TEXT = render(tiny())


@pytest.mark.parametrize("stage", ["captured", "discovered"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, stage: str, example: Callable[[str], Example], request: pytest.FixtureRequest) -> None:
    program: Program = request.getfixturevalue(stage)(name)
    text = render(program)
    again = parse(text, program.tensors)
    verify(again)
    assert render(again) == text
    assert (again.types, again.origins, again.inputs) == (program.types, program.origins, program.inputs)
    assert (again.symbols, again.stage, again.tables) == (program.symbols, program.stage, program.tables)
    _, inputs = example(name)
    torch.testing.assert_close(first(again(**inputs)), first(program(**inputs)), rtol=0, atol=0)


def test_without_tensors_the_program_has_no_weights() -> None:
    program = parse(TEXT)
    assert not program.has_weights
    assert render(program) == TEXT


LITERALS = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text(),
        st.sampled_from([torch.float32, torch.int64, torch.complex64, torch.bool]),
        st.sampled_from([torch.device("cpu"), torch.device("cuda:1")]),
        st.sampled_from([torch.strided, torch.contiguous_format]),
        st.builds(slice, *[st.none() | st.integers(-9, 99)] * 3),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(), inner, max_size=3),
    ),
    max_leaves=6,
)  # fmt: skip


@given(LITERALS)
def test_literals_come_back(value: object) -> None:
    """Also where a text holds quotes, new lines, brackets or percent signs."""
    text = render_value(value)
    cursor = Cursor(text, pytest.fail, pytest.fail)
    assert repr(cursor.value()) == repr(value)
    cursor.end()


def test_not_a_number_comes_back() -> None:
    text = TEXT.replace("div.Tensor(%to, 1000)", "div.Tensor(%to, float(nan))")
    assert render(parse(text)) == text


def test_a_value_without_a_literal_is_refused() -> None:
    with pytest.raises(IRError, match=r"has no literal form"):
        render_value(object())


def line_of(part: str) -> int:
    return next(number for number, line in enumerate(TEXT.splitlines(), 1) if part in line)


@pytest.mark.parametrize(
    ("part", "replacement", "sentence"),
    [
        ("stage captured", "stage caught", "malformed: 'CAUGHT'"),
        ("stage captured", "phase captured", "'phase' begins no line of IR text"),
        ("symbols B=2", "symbols B=two", "malformed: invalid literal"),
        ("input %sample sample", "input %sample noise", "malformed: 'noise' is not a valid Role"),
        ("tensor @conv_in.bias: 4xf32", "tensor @conv_in.bias: 4xf33", "does not begin with a type"),
        ("tensor @conv_in.bias: 4xf32", "tensor @conv_in.bias: int", "is declared with type int"),
        ("%silu: Bx8xf32 = ", "%silu = ", "expected ': '"),
        ("%silu: Bx8xf32 = ", "%silu: Bx8xf32 ", "expected ' = '"),
        ("aten.silu.default(%linear)", "aten.sliu.default(%linear)", "No operation 'aten.sliu.default'"),
        ("aten.silu.default(%linear)", "aten.silu.default(%linaer)", "%linaer is read before it is defined"),
        ("aten.silu.default(%linear)", "aten.silu.default(%linear", "expected a value"),
        ("aten.silu.default(%linear)", "aten.silu.default(%linear) and", "expected the end of the line"),
        ("@time.0.weight, ", "@time.9.weight, ", "tensor @time.9.weight is not declared"),
        ("%silu: Bx8xf32", "%div: Bx8xf32", "%div is defined twice"),
        ("dtype(f32)", "dtype(f33)", "malformed: 'f33'"),
        ('{at="time.1"', '{at="time.1', "expected '=' at column"),
        ("return %conv2d_1", "retrun %conv2d_1", "inside a function a line is"),
    ],
)  # fmt: skip
def test_malformed_text_names_the_line(part: str, replacement: str, sentence: str) -> None:
    assert part in TEXT
    text = TEXT.replace(part, replacement, 1)
    number = line_of(part)
    with pytest.raises(IRError) as error:
        parse(text)
    assert str(error.value).startswith(f"IR line {number}")
    assert sentence in str(error.value)
    assert error.value.notes[0].strip() == text.splitlines()[number - 1].strip()


def test_the_place_is_underlined() -> None:
    with pytest.raises(IRError) as error:
        parse(TEXT.replace("%silu: Bx8xf32 = ", "%silu: Bx8xf32 "))
    line, caret = error.value.notes[:2]
    assert line.strip()[caret.index("^")] == " "
    assert line.strip()[: caret.index("^")] == "%silu: Bx8xf32"


def test_whole_text() -> None:
    with pytest.raises(IRError, match="the text does not begin with 'tfqc-ir'"):
        parse(TEXT.partition("\n")[2])
    with pytest.raises(IRError, match="format 99 is newer than 1"):
        parse(TEXT.replace("tfqc-ir 1", "tfqc-ir 99"))
    with pytest.raises(IRError, match="@step has no closing brace"):
        parse(TEXT.rstrip().removesuffix("}"))


def test_tensors_must_be_those_declared() -> None:
    tensors = tiny().tensors
    with pytest.raises(IRError, match=r"no value is stored for tensor @time.0.bias"):
        parse(TEXT, {k: v for k, v in tensors.items() if k != "time.0.bias"})
    with pytest.raises(IRError, match=r"@time.0.bias is declared 8xf32, stored 8xf64"):
        parse(TEXT, {**tensors, "time.0.bias": tensors["time.0.bias"].double()})


@given(st.integers(0, len(TEXT)), st.integers(0, 20), st.sampled_from(["", "x", "(", '"', "%", "9", "\n", "}"]))
def test_damaged_text_is_an_error_or_a_program(at: int, length: int, inserted: str) -> None:
    with contextlib.suppress(IRError):
        parse(TEXT[:at] + inserted + TEXT[at + length :])
