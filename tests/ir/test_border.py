"""Everything else that IR text says is checked where it is read."""

from __future__ import annotations

import pytest

from tests.tiny import tiny
from tfqc.errors import IRError, TfqcError, VerifyError
from tfqc.ir.parse import parse
from tfqc.ir.render import render
from tfqc.ir.verify import verify

TEXT = render(tiny())


@pytest.mark.parametrize(
    ("part", "replacement", "sentence"),
    [
        ("tfqc-ir 1", "tfqc-ir １", "is no format's number"),
        ("model ", 'model "again"\nmodel ', "model stands a second time"),
        ('model "', 'model "\\n', "the model's name is no text of one line"),
        ("symbols B=2", "symbols B=0", "B=0 is no size"),
        ("symbols B=2", "symbols B=99999999999", "is no size"),
        ("symbols B=2", "symbols b=2", "'b' is no symbol"),
        ("symbols B=2", "symbols B=2 B=3", "B stands a second time"),
        ("symbols B=2", "symbols C=2", "has the symbol B, of which the program says no size"),
        ("input %timestep", "input %sample", "input %sample stands a second time"),
        ('"timestep"]: B', '"sample"]: B', "where another stands"),
        ("]: Bx2x4x4xf32", "]: Bx0x4x4xf32", "which has no elements"),
        ("tensor @conv_in.bias: 4xf32", "tensor @conv_in.bias: Bxf32", "has numbers for sizes"),
        ("tensor @conv_in.bias: 4xf32", "tensor @conv_in.bias: 4xf32\ntensor @conv_in.bias: 4xf32", "a second time"),
        ("tensor @conv_in.bias: 4xf32", f"tensor @conv_in.bias: {'9999999999x' * 3}f32", "larger than any tensor"),
        ("func @step", "func @main", "there is no function @main"),
        ("%sample: B", "%class: B", "is a word that Python reserves"),
        ('at="time.1"', 'at="x\\nimport os"', "at= is no text of one line"),
        ('at="time.1"', 'at="' + "x" * 5000 + '"', "at= is no text of one line"),
        ('at="time.1"', 'at="a" at="b"', "at= stands twice"),
        ("%silu: Bx8xf32", "%silu: (9**9**9)x8xf32", "has a power of"),
        ("%silu: Bx8xf32", f"%silu: {'(' * 5000}", "does not begin with a type"),
        ("%silu: Bx8xf32", f"%silu: ({'-' * 900}B)x8xf32", "is nested deeper"),
        ("  return", "  return %sample\n  return", "nothing stands behind 'return'"),
    ],
)  # fmt: skip
def test_refused(part: str, replacement: str, sentence: str) -> None:
    assert part in TEXT
    with pytest.raises(TfqcError) as error:
        verify(parse(TEXT.replace(part, replacement, 1)))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('constant ["a"] [1]', "a constant is none of"),
        ('constant ["a"] 99999999999999999999', "no number of 64 bits"),
        ('constant "a" 1', "a list of names"),
        ('arguments ["a\\u0000"]', "is no text of one line"),
        ('guard "B.real == 2"', "is not a comparison"),
        ('guard "(B and 1) == 2"', "is not integer arithmetic"),
        ('guard "H % 2 == 0"', "is not integer arithmetic over"),
        ('guard "B"', "is not a comparison"),
        ("table " + "[" * 100000, "is no table's name"),
        ("table schedule\n  schedule " + "[" * 100000, "malformed"),
        ('table schedule\n  schedule {"timesteps":["a"]}', "is no row of table 'schedule'"),
        ('table schedule\n  schedule {"timesteps":3}', "is no row of table 'schedule'"),
        ("symbols B=2", "symbols stands a second time"),
    ],
)
def test_refused_lines(line: str, sentence: str) -> None:
    with pytest.raises(IRError) as error:
        parse(TEXT.replace("symbols B=2\n", f"symbols B=2\n{line}\n", 1))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("%silu: Bx8xf32", "%silu: Bx777xi8", "%silu (time.1, tiny.py:"),
        ("%silu: Bx8xf32", "%silu: Bx7xf32", "is declared Bx7xf32, but aten.silu.default gives Bx8xf32 there"),
        ("%silu: Bx8xf32", "%silu: (B*B)x8xf32", "gives Bx8xf32"),
        ("%silu: Bx8xf32", "%silu: 2x8xf32", "gives Bx8xf32"),
        ("aten.div.Tensor(%to, 1000)", "aten.matmul.default(%to, %to)", "aten.matmul.default refuses its operands"),
    ],
)  # fmt: skip
def test_a_wrong_type_is_found_at_every_stage(old: str, new: str, sentence: str) -> None:
    program = parse(TEXT.replace(old, new, 1))
    with pytest.raises(VerifyError) as error:
        verify(program)
    assert sentence in "\n".join([str(error.value), *error.value.notes])


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ('table rows\n  row {"kind":"strange"}', "its kind is 'strange'"),
        ('table rows\n  row {"kind":"row"}', "@step has no such parameter"),
        ('table rows\n  conv_in.bias {"kind":"table"}', "there is no schedule"),
        ('table schedule\n  schedule {"timesteps":[]}', "the schedule has no timesteps"),
        ('table schedule\n  schedule {"timesteps":[NaN]}', "one that is not finite"),
        (
            'table rows\n  conv_in.bias {"kind":"activation"}\n\ntable schedule\n  schedule {"timesteps":[3,2,1]}',
            "@conv_in.bias is 4, and the schedule has 3 rows",
        ),
    ],
)
def test_tables_fit_together(table: str, sentence: str) -> None:
    with pytest.raises(VerifyError) as error:
        verify(parse(f"{TEXT}\n{table}\n"))
    assert sentence in "\n".join([str(error.value), *error.value.notes])


def test_tensors_of_odd_names_come_back() -> None:
    program = tiny()
    for node in program.step.nodes:
        if node.target == "conv_in.bias":
            node.target = "p.a b:c"
    program.tensors["p.a b:c"] = program.tensors.pop("conv_in.bias")
    text = render(program)
    assert '@"p.a b:c"' in text
    assert render(parse(text, program.tensors)) == text


def test_rows_of_no_known_table_are_kept() -> None:
    text = TEXT.replace('{at="time.1"', '{acme-gain=[1,{"a":2}] at="time.1"', 1) + '\ntable acme-plan\n  any {"x":1}\n'
    again = render(parse(text))
    assert 'acme-gain=[1,{"a":2}]' in again
    assert 'table acme-plan\n  any {"x":1}\n' in again
    assert render(parse(again)) == again
