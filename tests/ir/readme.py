"""What tfqc/ir/README.md says of the code is written by this: `python -m tests.ir.readme` brings it up to date."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tfqc.ir import ops, rows, views
from tfqc.ir.match import View, operand
from tfqc.ir.ops import op_name
from tfqc.ir.tables import Row

README = Path(__file__).parents[2] / "tfqc" / "ir" / "README.md"


def _summary(item: object) -> str:
    return (inspect.getdoc(item) or "").partition("\n")[0]


def _own(module: object, base: type[Any]) -> list[type[Any]]:
    """Classes of a module that derive from `base`, in the order in which they stand there."""
    return [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, base) and c is not base]


def files() -> Iterator[str]:
    """Each module, and the first line of its documentation."""
    for file in sorted(README.parent.glob("*.py")):
        if file.name != "__init__.py":
            first = file.read_text().partition("\n")[0].removeprefix('"""').removesuffix('"""')
            yield f"- `{file.stem}`: {first}"


def tables() -> Iterator[str]:
    """Each row class."""
    yield "| table | row class | is | keyed by | printed | fields |"
    yield "|---|---|---|---|---|---|"
    for row in _own(rows, Row):
        fields = ", ".join(f"`{f.name}`" for f in dataclasses.fields(row))
        kept = "durable" if row.durable else "derived"
        keys, where = "node" if row.of_node else "name", "inline" if row.inline else "section"
        yield f"| `{row.table}` | `{row.__name__}` | {kept} | {keys} | {where} | {fields} |"
    yield ""
    yield from (f"- `{row.table}`: {_summary(row)}" for row in _own(rows, Row))


def operations() -> Iterator[str]:
    """Each operation of the namespace tfqc."""
    for name in sorted(known.removeprefix("tfqc.") for known in ops._OURS):
        schema = str(getattr(torch.ops.tfqc, name).default._schema).removeprefix("tfqc::")
        function = next(getattr(m, name) for m in ops.DEFINED if hasattr(m, name))
        yield f"- `{schema.replace('1.0000000000000001e-05', '1e-05')}`"
        yield f"  {_summary(function)}"


def typed_views() -> Iterator[str]:
    """Each view: its operations, and its operands by the names of attributes."""
    yield "| view | of | operands |"
    yield "|---|---|---|"
    for view in _own(views, View):
        of = ", ".join(f"`{op_name(t)}`" for t in view.targets)
        operands = ", ".join(f"`{k}`" for k, v in vars(view).items() if isinstance(v, operand | property))
        yield f"| `{view.__name__}` | {of} | {operands} |"


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "files": files, "tables": tables, "operations": operations, "views": typed_views
}  # fmt: skip


def up_to_date(text: str) -> str:
    """A README whose parts between `<!-- NAME -->` and `<!-- end -->` are what the code says now."""

    def part(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n" + "\n".join(PARTS[found[1]]()) + "\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n(?:(?!<!--).)*<!-- end -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(up_to_date(README.read_text()))
