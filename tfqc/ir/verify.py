"""Invariants of each stage, checked between passes. A stage has its own and those of all before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from tfqc.errors import VerifyError
from tfqc.ir.ops import op_name, works_in_place
from tfqc.ir.program import STEP, Program, Role, Stage
from tfqc.ir.rows import Maintenance, Quantizer, RowSource, Tib

Check = Callable[[Program], Iterator[str]]


def verify(program: Program, after: str = "") -> None:
    """Check every invariant of the program's stage.

    Raises:
        VerifyError: with one sentence for the first broken invariant, and the others as notes.
    """
    problems = [p for stage, check in CHECKS if stage <= program.stage for p in check(program)]
    if problems:
        context = f" after {after}" if after else ""
        raise VerifyError(f"The program is not a valid {program.stage} program{context}: {problems[0]}", *problems[1:8])


def _well_formed(program: Program) -> Iterator[str]:
    if STEP not in program.functions:
        yield f"it has no @{STEP} function."
        return
    names = {n.name for g in program.functions.values() for n in g.nodes}
    for function, graph in program.functions.items():
        seen: set[fx.Node] = set()
        read: set[str] = set()
        past_inputs = False
        for node in graph.nodes:
            if any(n not in seen for n in node.all_input_nodes):
                yield f"%{node.name} in @{function} reads a value that is defined later or in another function."
            seen.add(node)
            past_inputs = past_inputs or node.op != "placeholder"
            if node.op == "placeholder" and past_inputs:
                yield f"parameter %{node.name} of @{function} stands after an operation."
            if node.op == "get_attr":
                if node.target not in program.tensors:
                    yield f"@{function} reads tensor @{node.target}, which the program does not hold."
                if node.target in read:
                    yield f"@{function} reads tensor @{node.target} through two nodes."
                read.add(str(node.target))
            if node.op != "output" and node.name not in program.types:
                yield f"{program.at(node)} has no type."
        if not any(n.op == "output" for n in graph.nodes):
            yield f"@{function} returns nothing."
    if stale := sorted(set(program.types) - names):
        yield f"%{stale[0]} has a type but does not exist."
    parameters = {n.name for n in program.step.nodes if n.op == "placeholder"}
    declared = {i.name for i in program.inputs}
    for function in program.functions:
        given = {n.name for n in program.functions[function].nodes if n.op == "placeholder"}
        if function != STEP and (strange := sorted(given - declared)):
            yield f"@{function} has parameter %{strange[0]}, which is no input of the model."
    for table, rows in program.tables.items():
        for name, row in rows.items():
            if row.of_node and name not in names:
                yield f"table {table} has a row for %{name}, which does not exist."
            if missing := [t for t in row.tensors() if t not in program.tensors]:
                yield f"table {table}, row {name}: tensor @{missing[0]} does not exist."
    if program.stage < Stage.FOLDED and parameters != declared:
        yield f"@{STEP} takes {sorted(parameters)} but the model's inputs are {sorted(declared)}."
    if not program.input(Role.TIME):
        yield "no input has the role 'time'."


ASSERTIONS = (
    "aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
)  # fmt: skip


def is_assertion(node: fx.Node) -> bool:
    """True for a node that only checks something and has no value."""
    return node.op == "call_function" and op_name(node.target).startswith(ASSERTIONS)


def _normalized(program: Program) -> Iterator[str]:
    for graph in program.functions.values():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if is_assertion(node):
                yield f"{program.at(node)} is an assertion: normalize removes them."
            elif not node.users:
                yield f"{program.at(node)} has no reader: normalize removes dead nodes."
            if works_in_place(node.target):
                yield f"{program.at(node)} works in place: normalize rewrites such operations."


def _decided(program: Program) -> Iterator[str]:
    temporal, maintenance = program.table(Tib), program.table(Maintenance)
    features = [name for name, row in temporal.items() if row.part == "feature"]
    if program.stage < Stage.FOLDED:
        for name in features:
            if name not in maintenance:
                yield f"temporal feature %{name} has no maintenance: select-maintenance gives it one."


def _calibrated(program: Program) -> Iterator[str]:
    for name, row in program.table(Quantizer).items():
        for tensor in row.tensors():
            value = program.tensors[tensor]
            if not value.is_meta and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                yield f"quantizer of %{name}: @{tensor} holds NaN or infinity."
            if tensor.endswith("scale") and not value.is_meta and not bool((value > 0).all()):
                yield f"quantizer of %{name}: @{tensor} holds a scale that is not positive."


def _folded(program: Program) -> Iterator[str]:
    parameters = {n.name for n in program.step.nodes if n.op == "placeholder"}
    declared = {i.name for i in program.inputs}
    sources = program.table(RowSource)
    for name in sorted(parameters - declared):
        if name not in sources:
            yield f"@{STEP} has parameter %{name}, and nothing says where its value comes from."


CHECKS: list[tuple[Stage, Check]] = [
    (Stage.CAPTURED, _well_formed),
    (Stage.NORMALIZED, _normalized),
    (Stage.ANALYZED, _decided),
    (Stage.CALIBRATED, _calibrated),
    (Stage.FOLDED, _folded),
]
