"""Invariants of each stage, checked between passes. A stage has its own and those of all before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from tfqc.errors import IRError, VerifyError
from tfqc.ir import ops
from tfqc.ir.calls import is_canonical
from tfqc.ir.consistency import inconsistencies
from tfqc.ir.infer import Memo, computes_sizes, mistyped
from tfqc.ir.ops import works_in_place
from tfqc.ir.program import STEP, Program, Stage
from tfqc.ir.rows import Maintenance, Quantizer, RowSource, Tib
from tfqc.ir.schema import check_call
from tfqc.ir.types import TensorType, storable
from tfqc.ir.worlds import worlds_of

Check = Callable[[Program], Iterator[str]]
Typed = dict[fx.Node, tuple[object, ...]]


def verify(program: Program, after: str = "", *, types: bool = True, typed: Typed | None = None) -> None:
    """Check every invariant of the program's stage; without `types`, which take most of the time, those of its form.

    `typed` is filled with the operations whose types were right, and with what they were: given again, only what has
    changed since is typed again.

    Raises:
        VerifyError: with one sentence for the first broken invariant, and the others as notes.
    """
    problems = list(_well_formed(program))
    if types and not problems:  # what is not well formed has operations that cannot be typed
        problems += _typed(program, {} if typed is None else typed)
    if STEP in program.functions:
        problems += (p for stage, check in CHECKS if stage <= program.stage for p in check(program))
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
    yield from inconsistencies(program)
    if program.stage < Stage.FOLDED and parameters != declared:
        yield f"@{STEP} takes {sorted(parameters)} but the model's inputs are {sorted(declared)}."
    yield from filter(None, (storable(name, tensor.dtype) for name, tensor in program.tensors.items()))


def _typed(program: Program, typed: Typed) -> Iterator[str]:
    """Every call is one that its operation takes, and its declared type is what the operation gives."""
    memo: Memo = {}
    worlds = worlds_of(program)
    for graph in program.functions.values():
        for node in graph.nodes:
            if node.op == "get_attr":
                tensor = program.tensors[str(node.target)]
                if program.types[node.name] != TensorType(tensor.dtype, tuple(tensor.shape)):
                    yield f"%{node.name} is declared {program.types[node.name]}, which @{node.target} is not."
            if node.op != "call_function":
                continue
            operands = node.all_input_nodes
            # Compared by identity: fx and we replace all of these, and change none of them.
            now = (node.target, node.args, node.kwargs, worlds, *(program.types[n.name] for n in (node, *operands)))
            if _same(typed.get(node, ()), now) and not any(computes_sizes(n) for n in operands):
                continue
            try:
                check_call(node.target, node.args, node.kwargs, program.types)
                reason = mistyped(program, node, memo)
            except IRError as error:
                yield f"{program.at(node)}: {error}"
                continue
            if reason:
                yield f"{program.at(node)} {reason}."
            else:
                typed[node] = now


def _same(before: tuple[object, ...], now: tuple[object, ...]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def is_assertion(node: fx.Node) -> bool:
    """True for a node that only checks something and has no value."""
    return node.op == "call_function" and ops.is_assertion(node.target)


def _normalized(program: Program) -> Iterator[str]:
    for graph in program.functions.values():
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if is_assertion(node):
                yield f"{program.at(node)} is an assertion: normalize removes them."
            elif not node.users:
                yield f"{program.at(node)} has no reader: normalize removes dead nodes."
            if not is_canonical(node):
                yield f"{program.at(node)} has operands by position: normalize names them, and `Rewriter.insert`."
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
            value = program.tensors.get(tensor)
            if value is None:
                continue  # said already
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
    (Stage.NORMALIZED, _normalized),
    (Stage.ANALYZED, _decided),
    (Stage.CALIBRATED, _calibrated),
    (Stage.FOLDED, _folded),
]
