"""Tables of what is known before sampling, computed anew from the time path that lies beside them."""

from __future__ import annotations

from torch import fx

from tfqc.ir.match import returned_by
from tfqc.ir.program import TIME, Program
from tfqc.ir.rows import RowSource, Schedule
from tfqc.temporal.tabulate import encode, feature_rows


def is_sealed(program: Program) -> bool:
    """True where tables hold temporal features and nothing is kept that they could be computed from again."""
    return any(source.kind == "table" and source.output < 0 for source in program.table(RowSource).values())


def refold(program: Program, changed: set[str]) -> list[str]:
    """Compute rows of those tables anew that depend on certain values of @time. Returns the names of the tables.

    Rows are what @time gives at each timestep of the schedule, in full precision; of quantized tables they are then
    quantized as `tfqc.runtime.encode_row` does.

    Args:
        changed: names of nodes in @time.
    """
    if not changed:
        return []
    outputs = _outputs(program.functions[TIME])
    touched = _depending(program.functions[TIME], changed)
    timesteps = program.table(Schedule)["schedule"].timesteps
    inputs = {item.name: item for item in program.inputs}
    made: list[str] = []
    for name, source in program.table(RowSource).items():
        if source.kind != "table" or outputs[source.output] not in touched:
            continue
        output = outputs[source.output]
        rows = feature_rows(program, [output], timesteps, inputs.get(source.label))[output.name]
        parts = (rows,) if source.encoding == "fp" else encode(rows, source.encoding)
        names = (name,) if source.encoding == "fp" else (name, source.scale, source.zero_point)
        for part, tensor in zip(names, parts, strict=True):
            program.tensors[part] = tensor.to(program.tensors[part].dtype)
        made.append(name)
    return made


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    returned = returned_by(graph)
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]  # type: ignore[list-item]


def _depending(graph: fx.Graph, changed: set[str]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.name in changed or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found
