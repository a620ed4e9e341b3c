"""What side tables say of nodes, tensors, rows and each other has to fit together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import fx

from tfqc.ir.data import BEGIN, STEP, TIME, ProgramData
from tfqc.ir.match import returned_value
from tfqc.ir.rows import BINDING_TIMES, BindingTime, Maintenance, Memory, Quantizer, RowSource, Schedule, Tib
from tfqc.runtime.outputs import check_structure

_KINDS = ("row", "begin", "time", "table", "activation")
_ENCODINGS = ("fp", "int8", "int4")
_POLICIES = ("recompute", "nearest", "error")


def inconsistencies(program: ProgramData) -> Iterator[str]:
    """A sentence for each row that cannot be."""
    names = {n.name for g in program.functions.values() for n in g.nodes}
    for table, rows in program.tables.items():
        for name, row in rows.items():
            if row.of_node and name not in names:
                yield f"table {table} has a row for %{name}, which does not exist."
            if missing := [t for t in row.tensors() if t not in program.tensors]:
                yield f"table {table}, row {name}: tensor @{missing[0]} does not exist."
    yield from _schedule(program)
    yield from _words(program)
    parameters = {n.name for n in program.step.nodes if n.op == "placeholder"}
    outputs = {name: _outputs(graph) for name, graph in program.functions.items()}
    for name, source in program.table(RowSource).items():
        if reason := _source(program, name, source, parameters, outputs):
            yield f"table rows, row {name}: {reason}."
    if program.outputs is not None:
        wanted = set(check_structure(program.outputs))
        if wanted != set(range(len(wanted))) or len(wanted) != outputs[STEP]:
            yield f"outputs names the tensors {sorted(wanted)}, and @step returns {outputs[STEP]}, counted from 0."
    for name, row in program.table(Memory).items():
        if row.buffer < 0 or not 0 <= row.first <= row.last:
            yield f"the memory of %{name} is {row.buffer} from {row.first} to {row.last}, which no buffer has."


def _words(program: ProgramData) -> Iterator[str]:
    for name, row in program.table(BindingTime).items():
        if row.time not in BINDING_TIMES.values():
            yield f"the binding time of %{name} is {row.time!r}: {', '.join(BINDING_TIMES.values())} are."
    for name, row in program.table(Tib).items():
        if row.part not in ("body", "feature"):
            yield f"the part of %{name} in the block is {row.part!r}: body and feature are."
    for name, row in program.table(Maintenance).items():
        if not row.strategy:
            yield f"the maintenance of %{name} names no strategy."
    for name, row in program.table(Quantizer).items():
        if not (0 <= row.weight_bits <= 16 and 0 <= row.input_bits <= 16 and row.group >= 0):
            yield f"the quantizer of %{name} has {row.weight_bits} and {row.input_bits} bits in groups of {row.group}."


def _schedule(program: ProgramData) -> Iterator[str]:
    for name, row in program.table(Schedule).items():
        if name != "schedule":
            yield f"table schedule has the row {name!r}: 'schedule' is the only one."
        if not row.timesteps or not all(map(_is_finite, row.timesteps)):
            yield "the schedule has no timesteps, or one that is not finite."
        if row.policy not in _POLICIES:
            yield f"the schedule's policy is {row.policy!r}: {', '.join(_POLICIES)} are."


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _source(
    program: ProgramData, name: str, source: RowSource, parameters: set[str], outputs: Mapping[str, int]
) -> str:
    """Why a row source cannot be; empty if it can."""
    if source.kind not in _KINDS:
        return f"its kind is {source.kind!r}: {', '.join(_KINDS)} are"
    domains = {i.name: i.domain for i in program.inputs}
    if source.label and domains.get(source.label) is None:
        return f"{source.label!r} is no input of class labels whose number is declared"
    if source.kind in ("row", "begin", "time"):
        if name not in parameters:
            return f"@{STEP} has no such parameter"
        return "" if source.kind == "row" else _output(source, outputs)
    if name not in program.tensors:
        return "there is no such tensor"
    schedule = program.table(Schedule).get("schedule")
    if schedule is None:  # activations are calibrated before a schedule is kept
        return "" if source.kind == "activation" else "there is no schedule that it could have rows for"
    parts = (
        [name] if source.kind == "activation" or source.encoding == "fp" else [name, source.scale, source.zero_point]
    )
    if absent := [part for part in parts if part not in program.tensors]:
        return f"there is no tensor @{absent[0]}"
    if source.encoding not in _ENCODINGS:
        return f"its encoding is {source.encoding!r}: {', '.join(_ENCODINGS)} are"
    rows = len(schedule.timesteps) * ((domains[source.label] or 1) if source.label else 1)
    for part in parts:
        shape = tuple(program.tensors[part].shape)
        if shape[:1] != (rows,):
            return f"@{part} is {'x'.join(map(str, shape))}, and the schedule has {rows} rows"
    return _output(source, outputs) if source.kind == "table" and source.output >= 0 else ""


def _output(source: RowSource, outputs: Mapping[str, int]) -> str:
    function = BEGIN if source.kind == "begin" else TIME
    if function not in outputs:
        return "" if source.kind == "table" else f"there is no @{function} that it could come from"
    return "" if 0 <= source.output < outputs[function] else f"@{function} has no output number {source.output}"


def _outputs(graph: fx.Graph) -> int:
    """How many values a function returns."""
    output = next((n for n in reversed(graph.nodes) if n.op == "output"), None)
    values = None if output is None else returned_value(output)
    return len(values) if isinstance(values, (list, tuple)) else 1
