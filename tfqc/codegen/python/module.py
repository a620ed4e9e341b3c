"""`model.py`, written in the same order for every backend: how to read it, imports, functions, facts, the class."""

from __future__ import annotations

import ast
import pprint
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import ModuleType

from torch import fx

from tfqc.codegen.python.bodies import DOCS
from tfqc.codegen.python.expressions import variable
from tfqc.codegen.python.names import check_names, harmless
from tfqc.ir.interpret import plan_of
from tfqc.ir.program import BEGIN, TIME, Program
from tfqc.runtime import kernel_ops, ops

_IMPORTS = """\
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
"""


@dataclass
class ModuleWriter:
    """What a backend says of its `model.py`.

    Fields:
        made_for: behind `compiled by tfqc`, in the first line.
        guide: how to read the file.
        imports: lines, beside those of torch and of operations.
        functions: texts of functions, `step` first.
        facts: name and value of constants, below a comment; a value is anything whose repr is its text.
        model: lines of the class.
        kernels: the file of kernels that the model is built with; its text is what `load` takes beside the directory.
        arguments: of the class behind the directory (and the text of kernels), as text.
    """

    program: Program
    made_for: str
    guide: str
    imports: Sequence[str]
    functions: Sequence[Iterable[str]]
    model: Iterable[str]
    arguments: str
    facts: Mapping[str, tuple[str, object]] = field(default_factory=dict[str, tuple[str, object]])
    kernels: str = ""

    def text(self) -> str:
        """The file.

        Raises:
            TfqcError: a line reads a name that was never made.
        """
        body = "\n".join(self._body()) + "\n"
        text = "\n".join(self._head(body)) + "\n" + body
        check_names(text)
        return text

    def _head(self, body: str) -> Iterator[str]:
        made_for = f" {self.made_for}" if self.made_for else ""
        yield f'"""{harmless(self.program.model)}, compiled by tfqc{made_for}. Generated.'
        yield ""
        yield from textwrap.wrap(self.guide, 115)
        yield '"""'
        yield ""
        first, *others = _IMPORTS.split("from pathlib", 1)
        replace = "from dataclasses import replace\n" if self.program.outputs is not None else ""
        yield from f"{first}{replace}from pathlib{others[0]}".splitlines()
        yield ""
        yield from sorted([*self.imports, *operations_in(body), "from tfqc.runtime import Input, Plan, Table"])
        yield ""
        yield "aten = torch.ops.aten"
        yield ""

    def _body(self) -> Iterator[str]:
        for function in self.functions:
            yield ""
            yield from function
            yield ""
        yield ""
        yield f"PLAN = {pprint.pformat(plan_of(self.program), width=110)}"
        if self.program.outputs is not None:
            yield ""
            yield "# The structure of what the model returns, around the tensors of `step`."
            yield f"PLAN = replace(PLAN, outputs={pprint.pformat(self.program.outputs, width=110)})"
        for name, (comment, value) in self.facts.items():
            yield ""
            yield f"# {comment}"
            yield f"{name} = {value if isinstance(value, str) else pprint.pformat(value, width=110)}"
        yield ""
        yield ""
        yield from self.model
        yield ""
        yield ""
        yield from self._load()

    def _load(self) -> Iterator[str]:
        if not self.kernels:
            yield "def load(directory: str | Path) -> Model:"
            yield '    """The model, from the directory that holds its tensors."""'
            yield f"    return Model(Path(directory), {self.arguments}).eval()"
            return
        yield "def load(directory: str | Path, kernels: str | None = None) -> Model:"
        yield f'    """The model, from the directory of its tensors; `kernels` is the text of {self.kernels}, which is'
        yield '    read beside this file if there is none."""'
        yield f'    text = Path(__file__).with_name("{self.kernels}").read_text() if kernels is None else kernels'
        yield f"    return Model(Path(directory), text, {self.arguments}).eval()"


def operations_in(body: str) -> Iterator[str]:
    """Imports of those of tfqc's operations that a text calls."""
    read = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    found: set[str] = set()
    for module in (ops, kernel_ops):
        if names := sorted((read & _public(module)) - found):
            found.update(names)
            yield f"from {module.__name__} import {', '.join(names)}"


def _public(module: ModuleType) -> set[str]:
    own = {k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__}
    return {name for name in own if not name.startswith("_")}


def helpers(graph: fx.Graph, letters: str) -> list[str]:
    """Names for what a function is given beside its values: letters, but where a value is called so."""
    taken = {variable(n) for n in graph.nodes}
    return [next(n for i in count() if (n := letter + "_" * i) not in taken) for letter in letters]


def parameters(graph: fx.Graph) -> list[str]:
    """Of a function, by keyword."""
    return ["*", *(f"{variable(n)}: Tensor" for n in graph.nodes if n.op == "placeholder"), "**_: Tensor"]


def engine_class(program: Program, members: Sequence[str]) -> Iterator[str]:
    """The class of a backend whose `Engine` calls functions of the module; `members` are the first of them."""
    yield "class Model(Engine):"
    yield f'    """{harmless(program.model)}: called with the inputs of the model that was captured."""'
    yield ""
    yield from (f"    {member}" for member in members)
    for function in (BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield f"    def {function}(self, /, **inputs: Tensor) -> Any:"
            yield f'        """{DOCS[function]}"""'
            yield f"        return {function}(self.get_tensor, **inputs)"
