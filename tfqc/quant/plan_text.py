"""A plan as text: a line for each layer, in the program's order. People read it, edit it and give it back.

    by plan-quantization
    conv_in     weight -> int8{per=channel why=edges=8}   input -> int8{per=step symmetric=false}
    %linear_7   input -> float{by=Ann why=outliers}

A layer is named by its module's path, or by `%` and its node's name where the module is not its alone. The line `by`
names who chose what does not say it. `#` begins a comment. Operands that no line names are planned by the options of
the pipeline.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest

from torch import fx

from tfqc.analysis.binding import Roles, binding_times
from tfqc.analysis.weighted import weight_of, weighted_nodes
from tfqc.errors import SpecError
from tfqc.ir.program import Program, Role
from tfqc.ir.rows import QuantPlan
from tfqc.ir.views import Linear
from tfqc.passing.spec import Reader, Spec
from tfqc.quant.formats import Specs, check_parts, spec_of, specs_of_text, specs_to_text

_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_KEY = re.compile(r"%?[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*")
_BY = re.compile(r"\s*by\s+([A-Za-z_][A-Za-z0-9_\-]*)\s*(?:#.*)?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_\-]*?(?=\s|->|$)")


@dataclass(frozen=True)
class Line:
    """What a plan says of a layer: the path of its module, or `%` and its node's name; specs by operand."""

    number: int
    key: str
    operands: Mapping[str, Specs]


def plan_to_text(program: Program) -> str:
    """The table `plan` of a program."""
    keys = _keys(program)
    rows = program.table(QuantPlan)
    nodes = [node for node in program.step.nodes if node.name in rows]
    specs = {n: {operand: specs_of_text(text) for operand, text in rows[n.name].operands.items()} for n in nodes}
    authors = Counter(spec.by for operands in specs.values() for found in operands.values() for spec in found)
    # Most specs have one author, whom one line names for all, if all have one.
    most = authors.most_common(1)[0][0] if authors else ""
    author = most if _WORD.fullmatch(most) and "" not in authors else ""
    cells = [
        [keys[n], *(f"{operand} -> {_without(found, author)}" for operand, found in specs[n].items())] for n in nodes
    ]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    lines = [f"# What is quantized of {_comment(program.model)}, and to what: a line for each layer."]
    lines += [f"by {author}"] if author else []
    for node, row in zip(nodes, cells, strict=True):
        line = "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip()
        lines.append(f"{line}   # {_comment(program.at(node))}" if keys[node].startswith("%") else line)
    return "\n".join(lines) + "\n"


def _without(specs: Specs, author: str) -> str:
    return specs_to_text(tuple(replace(spec, by="") if spec.by == author else spec for spec in specs))


def read_plan(text: str) -> list[Line]:
    """The lines of a plan.

    Raises:
        SpecError: a line that is malformed, says what cannot be, or speaks of a layer again; its number is told.
    """
    lines: dict[str, Line] = {}
    author = ""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):  # some editors begin files with it
        reader = Reader(line)
        reader.blank()
        if reader.at == len(line):
            continue
        try:
            if by := _BY.fullmatch(line):
                author = by[1]
                continue
            key = reader.match(_KEY, "a module's path, or % and a node's name")
            found = Line(number, key, dict(_operands(reader, author)))
        except SpecError as error:
            raise SpecError(f"Line {number} of the plan: {error}", *error.notes) from error
        if found.key in lines:
            raise SpecError(f"Line {number} of the plan: line {lines[found.key].number} is for {found.key}, too.")
        lines[found.key] = found
    return list(lines.values())


def bind_plan(program: Program, text: str, steps: int | None) -> dict[str, QuantPlan]:
    """Rows of the table `plan` for the nodes that a plan's lines name; `steps` is the length of the schedule.

    Raises:
        SpecError: a line that names what the program has not, or asks for what cannot be.
    """
    by_key: dict[str, list[fx.Node]] = {}
    for node in program.nodes():
        if node.op == "call_function":
            by_key[f"%{node.name}"] = [node]
    for node in weighted_nodes(program):
        by_key.setdefault(_module(program, node), []).append(node)
    roles = binding_times(program)
    rows: dict[str, QuantPlan] = {}
    for line in read_plan(text):
        where = f"Line {line.number} of the plan: "
        if line.key not in by_key:
            raise SpecError(f"{where}{program.model} has no linear or convolution {line.key}.{_near(line.key, by_key)}")
        for node in by_key[line.key]:
            if node.name in rows:
                raise SpecError(f"{where}another line is for {program.at(node)}, too.")
            for operand, specs in line.operands.items():
                if why := _impossible(program, node, operand, specs, roles[node.name], steps):
                    raise SpecError(where + why.removesuffix(".") + ("" if why.endswith("?") else "."))
            rows[node.name] = QuantPlan({operand: specs_to_text(specs) for operand, specs in line.operands.items()})
    return rows


def _operands(reader: Reader, author: str) -> Iterator[tuple[str, Specs]]:
    seen: set[str] = set()
    reader.blank()
    while reader.at < len(reader.text):
        start = reader.at
        operand = reader.match(_NAME, "an operand's name, such as weight or input")
        if operand in seen:
            reader.at = start
            raise reader.fail(f"each operand once, not {operand!r} again,")
        seen.add(operand)
        reader.blank()
        if not reader.take("->"):
            raise reader.fail(f"'->' after {operand!r}")
        yield operand, _specs(reader, author)
    if not seen:
        raise reader.fail("an operand and its format, such as `weight -> int8{per=channel}`,")


def _specs(reader: Reader, author: str) -> Specs:
    found: list[Spec] = []
    while not found or reader.take(","):
        reader.blank()
        found.append(Spec(reader.match(_WORD, "a format, such as int8"), reader.options()))
    specs = tuple(replace(spec, by=spec.by or author) for spec in map(spec_of, found))
    check_parts(specs)
    return specs


def _impossible(program: Program, node: fx.Node, operand: str, specs: Specs, roles: Roles, steps: int | None) -> str:
    """Why an operand of a node cannot be what a plan says, whatever passes can do; empty if it can."""
    names = _operands_of(node)
    if operand not in names:
        close = difflib.get_close_matches(operand, names, 1)
        read = f"but {', '.join(names)}" if names else "and reads nothing but lists of values, which are not planned"
        return f"{program.at(node)} has no operand {operand!r}, {read}" + (
            f": did you mean {close[0]!r}?" if close else ""
        )
    for spec in specs:
        if operand == "weight" and weight_of(node) is not None and spec.per in ("token", "step"):
            return f"a weight is the same for every {spec.per}, so it has a scale for each channel or group"
        of_steps = spec.per == "step" or spec.steps is not None
        if operand == "input" and of_steps and not roles & {Role.SAMPLE, Role.TIME}:
            return f"{program.at(node)} runs once per image, where there are no steps"
        if operand == "input" and of_steps and not program.input(Role.TIME):
            return f"{program.model} is told no time that is one number for each image, so no step is known"
    return _not_whole(specs, "channels", _channels(program, node)) or _not_whole(specs, "steps", steps)


def _not_whole(specs: Specs, what: str, total: int | None) -> str:
    """Why parts do not make up the whole of `total` channels or steps; empty if they do, or it is not known."""
    parts = sorted({part for spec in specs if (part := getattr(spec, what)) is not None})
    if not parts or (parts[0][0] == 0 and total in (None, parts[-1][1])):
        return ""
    whole = f"there are {total}" if total is not None else "the first is 0"
    return f"the {what} {parts[0][0]} to {parts[-1][1]} are not all: {whole}"


def _channels(program: Program, node: fx.Node) -> int | None:
    """Channels of a layer's input, where they are known."""
    if weight_of(node) is None:
        return None
    type_ = program.tensor_type(node.all_input_nodes[0])
    size = None if type_ is None else type_.shape[-1 if Linear.of(node) else 1]
    return size if isinstance(size, int) else None


def _operands_of(node: fx.Node) -> list[str]:
    """Names of the values and tensors that an operation reads, as its schema has them."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema is not None else []
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return [name for name, value in given.items() if isinstance(value, fx.Node)]


def _keys(program: Program) -> dict[fx.Node, str]:
    """How lines name the nodes of @step: by the module where it is theirs alone."""
    modules: dict[str, list[fx.Node]] = {}
    for node in weighted_nodes(program):
        modules.setdefault(_module(program, node), []).append(node)
    alone = {nodes[0]: path for path, nodes in modules.items() if len(nodes) == 1 and _MODULE.fullmatch(path)}
    return {node: alone.get(node, f"%{node.name}") for node in program.step.nodes}


def _module(program: Program, node: fx.Node) -> str:
    origin = program.origins.get(node.name)
    return origin.module if origin is not None and origin.module else ""


def _near(key: str, known: Mapping[str, object]) -> str:
    close = difflib.get_close_matches(key, [k for k in known if k.startswith("%") == key.startswith("%")], 1)
    return f" Did you mean {close[0]!r}?" if close else " `tfqc inspect --plan` prints the names."


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
