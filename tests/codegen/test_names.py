"""Emission checks its own names, and text of others cannot leave the comment or docstring that it stands in."""

from __future__ import annotations

import ast
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import tiny
from tfqc.codegen.python.names import check_names, harmless
from tfqc.codegen.target import Target
from tfqc.errors import TfqcError
from tfqc.ir.program import Origin, Program, Stage

GOOD = """
import torch
TABLE = {"a": [x for x in range(3)]}
def step(w, /, *, x, **_):
    for name, value in w.items():
        x = x + value
    if x.any():
        y = torch.relu(x)
    z = y * TABLE["a"][0]; del y
    return z
"""


def test_straight_lines_are_good() -> None:
    check_names(GOOD)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("return z", "return zz", "zz"),
        ("return z", "return y", "y"),  # it was deleted
        ("torch.relu(x)", "tarch.relu(x)", "tarch"),
        ("TABLE[", "TABLES[", "TABLES"),
        ("w.items()", "v.items()", "v"),
        ("return z", "z = q + 1; q = 2\n    return z", "q"),  # it is made too late
    ],
)
def test_a_name_that_was_never_made(old: str, new: str, name: str) -> None:
    with pytest.raises(TfqcError, match=rf"reads '{name}', which no line before it makes"):
        check_names(GOOD.replace(old, new))


@given(st.text())
def test_any_text_is_harmless(text: str) -> None:
    shown = harmless(text)
    assert "\n" not in shown and "\r" not in shown
    code = f'"""{shown}, compiled."""\n# {shown}\nx = 1\n'
    assert [type(s) for s in ast.parse(code).body] == [ast.Expr, ast.Assign]


def _named(program: Program, model: str, module: str) -> Program:
    changed = dataclasses.replace(program, model=model, stage=Stage.LOWERED)
    changed.origins = {n.name: Origin(module, "") for n in program.step.nodes}
    return changed


@pytest.mark.parametrize("target", ["fake-quant", "cpu-int8"])
@pytest.mark.parametrize(
    "text", ['"""\nimport os\n"""', "x\nimport os", "\\", 'a"', "\u2028import os", "\x0cimport os"]
)
def test_names_of_models_and_modules_are_no_code(target: str, text: str) -> None:
    parsed = Target.parse(target)
    emitted = parsed.backend.emit(_named(tiny(), text, text), parsed.options).texts["model.py"]
    assert "os" not in {
        alias.name for n in ast.walk(ast.parse(emitted)) if isinstance(n, ast.Import) for alias in n.names
    }
