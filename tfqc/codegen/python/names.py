"""Names in generated code: text of others made harmless, and a check that every name that is read was made."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

from tfqc.errors import TfqcError


def harmless(text: str) -> str:
    """A text as it may stand in a comment or a docstring: one line, nothing that ends it."""
    return repr(text)[1:-1].replace('"', "'")


def check_names(text: str) -> None:
    """Generated functions are straight lines, so each name can be followed from where it is made to where it is read.

    Raises:
        TfqcError: a line reads what no line before it made, or what was deleted.
    """
    module = ast.parse(text)
    known = {*vars(builtins), "__file__", *(n for s in module.body for n in _made(s))}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            live = known | {a.arg for a in _arguments(node.args)}
            for statement in node.body:
                _check_statement(statement, live)


def _check_statement(statement: ast.stmt, live: set[str]) -> None:
    names = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
    stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    # What a loop, a branch or a comprehension makes is read within it.
    within = stored if not isinstance(statement, ast.Assign) or _comprehends(statement) else set[str]()
    for name in names:
        if isinstance(name.ctx, ast.Load) and name.id not in live and name.id not in within:
            raise TfqcError(
                f"Emission wrote a line that reads {name.id!r}, which no line before it makes: "
                f"{ast.unparse(statement)[:200]!r}. This is a fault of tfqc: please report it."
            )
    if isinstance(statement, ast.Delete):
        live -= {t.id for t in statement.targets if isinstance(t, ast.Name)}
    else:
        live |= stored | set(_made(statement))


def _comprehends(statement: ast.stmt) -> bool:
    return any(isinstance(n, ast.comprehension) for n in ast.walk(statement))


def _made(statement: ast.stmt) -> Iterator[str]:
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            yield from (alias.asname or alias.name.split(".")[0] for alias in names)
        case ast.Assign(targets=targets):
            yield from (t.id for t in targets if isinstance(t, ast.Name))
        case ast.AnnAssign(target=ast.Name(id=name)):
            yield name
        case _:
            pass


def _arguments(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    yield from (a for a in (arguments.vararg, arguments.kwarg) if a is not None)
