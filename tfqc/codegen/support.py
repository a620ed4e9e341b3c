"""Which nodes of a program a backend runs, and how it says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import fx

from tfqc.errors import TfqcError
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.passing.remarks import Remark
from tfqc.quant.formats import specs_to_text
from tfqc.quant.plan import planned
from tfqc.quant.planning import undoing


@dataclass(frozen=True)
class Support:
    """Whether a backend runs a node. Data and no exception, so all refusals can be listed.

    `because` says why not; or, for a node that runs, why not as the target promises (in floating point, say). Where
    that lies in how an operand is quantized, `operand` names it and `takes` is a spec that would do
    (`tfqc.quant.formats`).
    """

    ok: bool
    because: str = ""
    operand: str = ""
    takes: str = ""


YES = Support(True)


class Claims(Protocol):
    """What answers for nodes: a backend."""

    def supports(self, program: Program, node: fx.Node, options: Any) -> Support:
        """Whether a node of a lowered program runs."""
        ...


Answers = list[tuple[fx.Node, str]]


def refused(backend: Claims, program: Program, options: Any) -> Answers:
    """The nodes that a backend does not run, and why."""
    answers = _answers(backend, program, options)
    return [(node, _because(program, node, support)) for node, support in answers if not support.ok]


def compromised(backend: Claims, program: Program, options: Any) -> Answers:
    """The nodes that a backend runs in another way than the target promises, and why."""
    answers = _answers(backend, program, options)
    return [(n, _because(program, n, support)) for n, support in answers if support.ok and support.because]


def refusals(backend: Claims, program: Program, options: Any) -> list[str]:
    """One sentence for each kind of node that a backend does not run."""
    return grouped(program, refused(backend, program, options))


def grouped(program: Program, answers: Answers) -> list[str]:
    """One sentence for all nodes of one operation and reason: `12 x aten.mul.Tensor (a.0, a.1, ... 10 more): why`."""
    return list(map(str, remarks_on(program, answers, "")))


def remarks_on(program: Program, answers: Answers, backend: str) -> list[Remark]:
    """What `grouped` says as remarks; each names the first of its nodes."""
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node, because in answers:
        groups.setdefault((op_name(node.target), because), []).append(node)
    found: list[Remark] = []
    for (operation, because), nodes in groups.items():
        first, facts = nodes[0].name, {"operation": operation, "because": because, "count": len(nodes)}
        if len(nodes) == 1:
            found.append(Remark(backend, "another-way", first, {**facts, "at": program.at(nodes[0])}))
            continue
        places = dict.fromkeys(_place(program, node) for node in nodes)
        shown = [*places][:2] + ([f"... {len(places) - 2} more"] if len(places) > 2 else [])
        found.append(Remark(backend, "another-way-each", first, {**facts, "places": ", ".join(shown)}))
    return found


def _because(program: Program, node: fx.Node, support: Support) -> str:
    """Why, and what of the plan would have to be another: `..; planned as int8 for edges=8 (edges=none: ..)`."""
    if not support.operand:
        return support.because
    mends = [f"kernels take {support.takes}"]
    said = ""
    if specs := planned(program, node, support.operand):
        said = f"planned as {specs_to_text(tuple(replace(spec, by='', why='') for spec in specs))}"
        said += f" for {why}, " if (why := specs[0].why) else ", "
        mends += [mend] if (mend := undoing(why)) else []
    return f"{support.because} ({said}{': '.join(mends)})"


def _place(program: Program, node: fx.Node) -> str:
    origin = program.origins.get(node.name)
    return origin.module if origin is not None and origin.module else f"%{node.name}"


def _answers(backend: Claims, program: Program, options: Any) -> Iterator[tuple[fx.Node, Support]]:
    for function in program.functions:
        for node in program.nodes(function):
            if node.op == "call_function":
                answer = backend.supports(program, node, options)
                if not isinstance(answer, Support):  # pyright: ignore[reportUnnecessaryIsInstance]
                    kind = type(backend).__name__
                    raise TfqcError(f"{kind}.supports answered {answer!r} for {op_name(node.target)}: give a Support.")
                yield node, answer
