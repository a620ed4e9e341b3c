"""`model.py` of backends whose run time is imported: signatures of its functions, and the class at its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from torch import fx

from tfqc.emission.bodies import DOCS
from tfqc.emission.expressions import variable
from tfqc.ir.program import BEGIN, TIME, Program


def helpers(graph: fx.Graph, letters: str) -> list[str]:
    """Names for what a function is given beside its values: letters, but where a value is called so."""
    taken = {variable(n) for n in graph.nodes}
    return [next(n for i in count() if (n := letter + "_" * i) not in taken) for letter in letters]


def parameters(graph: fx.Graph) -> str:
    """Of a function, by keyword."""
    names = [f"{variable(n)}: Tensor" for n in graph.nodes if n.op == "placeholder"]
    return ", ".join(["*", *names, "**_: Tensor"])


def model_class(program: Program, members: Sequence[str], arguments: str) -> Iterator[str]:
    """The class, whose `members` are functions of the module, and `load`, which makes it with the `arguments`."""
    yield "class Model(Engine):"
    yield f'    """{program.model}: called with the inputs of the model that was captured."""'
    yield ""
    yield from (f"    {member}" for member in members)
    for function in (BEGIN, TIME):
        if function in program.functions:
            yield ""
            yield f"    def {function}(self, **inputs: Tensor) -> Any:"
            yield f'        """{DOCS[function]}"""'
            yield f"        return {function}(self.get_tensor, **inputs)"
    yield ""
    yield ""
    yield "def load(directory: str | Path) -> Model:"
    yield '    """The model, from the directory that holds this file."""'
    yield f"    return Model({arguments}).eval()"
