"""Generated lines that are too long for a person are folded at operands, and stay the same Python."""

from __future__ import annotations

import ast

import pytest

from tfqc.codegen.python.wrapping import WIDTH, signature, wrapped

OPERANDS = ", ".join(f'name_{i}=w("a.very.long.name.of.a.tensor, [{i}]")' for i in range(9))


def test_short_lines_stay() -> None:
    assert list(wrapped("    x = f(a, b); del a")) == ["    x = f(a, b); del a"]


@pytest.mark.parametrize(
    "line",
    [
        f"    x = k.conv({OPERANDS}); del y",
        f"    x, y = k.a({OPERANDS}), k.b({OPERANDS})",
        f"    x = [{OPERANDS.replace('=', ' == ')}]",
        f"    x = 'it is a \\' quote ( that is none'.join(({OPERANDS.replace('=', ' == ')}))",
    ],
)
def test_folded_lines_are_the_same_python(line: str) -> None:
    lines = list(wrapped(line))
    assert len(lines) > 2 and ast.dump(ast.parse("\n".join(lines).strip())) == ast.dump(ast.parse(line.strip()))


def test_lines_are_as_long_as_fits() -> None:
    lines = list(wrapped(f"    x = k.conv({OPERANDS})"))
    assert max(map(len, lines)) <= WIDTH and len(lines) < 9


def test_signatures() -> None:
    lines = list(signature("step", ["*", *(f"parameter_{i}: Tensor" for i in range(12)), "**_: Tensor"], "Any"))
    assert max(map(len, lines)) <= WIDTH
    (made,) = ast.parse("\n".join([*lines, "    return None"])).body
    assert isinstance(made, ast.FunctionDef) and len(made.args.kwonlyargs) == 12
