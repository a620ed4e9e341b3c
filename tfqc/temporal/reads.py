"""Rewriting nodes of @step into reads of tables, by the row of the timestep."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tfqc.ir.calls import canonical
from tfqc.ir.match import is_call
from tfqc.ir.program import Input, Program, Role
from tfqc.ir.rows import Quantizer, QuantPlan, RowSource, Schedule
from tfqc.ir.types import TensorType
from tfqc.temporal.tabulate import as_kept, encode

# Operations that take one row for the whole batch as well as a row for each entry.
aten, ours = torch.ops.aten, torch.ops.tfqc
_BROADCASTS = (
    aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor, ours.conv2d_rows.default,
    ours.group_norm_rows.default, ours.layer_norm_rows.default, aten.addcmul.default, aten.where.self,
)  # fmt: skip


class RowIndices:
    """The row index parameters of @step: one for plain tables, one for each input of class labels."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._labelled: dict[str, fx.Node] = {}
        program.symbols.setdefault("R", 1)
        self.plain = self._add("row", "", "R")

    def of(self, label: Input | None) -> fx.Node:
        """The index into tables that have a row for each label."""
        if label is None:
            return self.plain
        if label.name not in self._labelled:
            self._labelled[label.name] = self._add(f"row_{label.name}", label.name, "B")
        return self._labelled[label.name]

    def _add(self, name: str, label: str, size: str) -> fx.Node:
        node = self._program.add_input(name, TensorType(torch.int64, (size,)))
        self._program.tables[RowSource.table][node.name] = RowSource("row", label=label)
        return node


def become_table_read(
    program: Program,
    node: fx.Node,
    row: fx.Node,
    rows: Tensor,
    strategy: tuple[str, ...],
    output: int,
    label: Input | None,
) -> None:
    """Turn a node into a read of a compile-time table: encoded where all its steps are cached, else as it is.

    An encoded table has the bits of the finest of its steps; coarser ones keep their own rounding in it. What is no
    real number (positions, truths, rotations as complex numbers) is never encoded.
    """
    stem = f"table.{node.name}"
    steps = len(program.table(Schedule)["schedule"].timesteps)
    of_row = [strategy[i * steps // len(rows) if len(strategy) > 1 else 0] for i in range(len(rows))]
    wanted = set(strategy) - {"tib"}
    encoded = rows.is_floating_point()
    if len(wanted) > 1 and encoded:
        rows = as_kept(rows, of_row)
    source = RowSource("table", output, label=label.name if label else "")
    if not encoded or not wanted <= {"cache4", "cache8"}:
        name = program.add_tensor(stem, rows)
        program.tables[RowSource.table][name] = source
        _become(program, node, ours.table_read.default, program.tensor_node(name), row)
        return
    encoding = "int8" if "cache8" in wanted else "int4"
    codes, scale, zero_point = encode(rows, encoding)
    names = program.add_tensors(stem, {"": codes, "scale": scale, "zero_point": zero_point})
    program.tables[RowSource.table][names[0]] = replace(source, encoding=encoding, scale=names[1], zero_point=names[2])
    operands = [program.tensor_node(n) for n in names]
    if encoding == "int8":
        _become(program, node, ours.table_decode.default, *operands, row)
    else:
        _become(program, node, ours.table_decode_int4.default, *operands, row, list(rows.shape[1:]))


def become_request_read(program: Program, node: fx.Node, row: fx.Node, output: int) -> None:
    """Turn a node into a read of a table that is built once per image."""
    type_ = program.tensor_type(node)
    assert type_ is not None
    steps = len(program.table(Schedule)["schedule"].timesteps)
    table = program.add_input(f"table_{node.name}", TensorType(type_.dtype, (steps, *type_.shape)))
    program.tables[RowSource.table][table.name] = RowSource("time", output)
    _become(program, node, ours.request_read.default, table, row)


def _become(program: Program, node: fx.Node, target: Any, *args: Any) -> None:
    """Let a node compute the same value in another way: it keeps its name, its readers, its place."""
    # Its type stays: one row for the whole batch is one for each of its entries.
    node.target, (node.args, node.kwargs) = target, canonical(target, args, {})
    for kind in (Quantizer, QuantPlan):
        program.tables.get(kind.table, {}).pop(node.name, None)


def detach(program: Program, node: fx.Node) -> fx.Node:
    """A copy of a node that goes on being computed at every step, quantized as the node was to be."""
    copied = program.insert(node, node.target, node.args, node.kwargs, name=f"{node.name}_tib", like=node)
    for kind in (Quantizer, QuantPlan):
        if row := program.tables.get(kind.table, {}).get(node.name):
            program.tables[kind.table][copied.name] = row
    return copied


def switch(program: Program, read: fx.Node, kept: fx.Node, row: fx.Node, strategy: tuple[str, ...]) -> None:
    """Read the table at the steps that have a row there, the quantized TIB at the others.

    An unknown timestep does as the nearest step.
    """
    rank = len(program.tensor_type(read).shape) - 1  # type: ignore[union-attr]
    mask = torch.tensor([s != "tib" for s in strategy]).reshape(-1, *[1] * rank)
    name = program.add_tensor(f"mask.{read.name}", mask)
    program.tables[RowSource.table][name] = RowSource("activation")
    after = read.next
    users = list(read.users)
    picked = program.insert(after, aten.index_select.default, (program.tensor_node(name), 0, row), like=read)
    chosen = program.insert(after, aten.where.self, (picked, read, kept), like=read)
    for user in users:
        user.replace_input_with(read, chosen)


def widen(program: Program, read: fx.Node) -> None:
    """Readers that do not broadcast one row over the batch get a row for each batch entry."""
    type_ = program.tensor_type(read)
    strict = [u for u in read.users if not _broadcasts(program, u, read)]
    if type_ is None or not strict:
        return
    sample = program.node(program.input(Role.SAMPLE)[0].name)
    batch = program.insert(read, aten.sym_size.int, (sample, 0), like=read)
    sizes = [batch, *[-1] * (len(type_.shape) - 1)]
    wide = program.insert(read.next, aten.expand.default, (read, sizes), like=read)
    for user in strict:
        user.replace_input_with(read, wide)


def _broadcasts(program: Program, reader: fx.Node, read: fx.Node) -> bool:
    """True for an operation that takes one row for the whole batch as well: another operand brings the batch."""
    if not is_call(reader, *_BROADCASTS):
        return False
    types = [program.tensor_type(n) for n in reader.all_input_nodes if n is not read]
    own = program.tensor_type(read)
    return any(t and own and len(t.shape) >= len(own.shape) and t.shape[0] == program.batch for t in types)
