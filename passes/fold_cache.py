"""fold-cache: temporal features become table rows, or constants of the operation that reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from tfqc.analysis.binding import binding_times
from tfqc.analysis.fold import fold_affine, fold_bias
from tfqc.analysis.outline import outline
from tfqc.ir.ops import op_name
from tfqc.ir.program import STEP, TIME, Program, Role, Stage
from tfqc.ir.rows import BindingTime, Maintenance, Quantizer, RowSource, Schedule, Tib
from tfqc.ir.types import TensorType
from tfqc.passing import LOSSY, Context, Numerics, Pass, close
from tfqc.runtime import encode_row

# Operations that take one row for the whole batch as well as a row for each entry.
_BROADCASTS = {
    "aten.add.Tensor", "aten.mul.Tensor", "aten.sub.Tensor", "aten.div.Tensor", "tfqc.conv2d_rows.default",
    "tfqc.group_norm_rows.default", "tfqc.layer_norm_rows.default", "aten.addcmul.default",
}  # fmt: skip


@dataclass(frozen=True)
class FoldCache(Pass):
    """Take the TIB out of the step: each feature becomes what its maintenance says.

    `fold`: exact, as the per-step bias of the convolution before it, or the per-step affine of the norm before it,
    where the graph allows, else an fp table; `table`: an fp table; `cache4`, `cache8`: a quantized table; `tib`:
    it stays. Features that depend on request inputs become tables built once per image, in full precision.

    Options: mode (restricts `fold` to `bias`, `affine` or plain `table`s; `exact` = all); policy for timesteps that are
    not in the schedule.
    """

    name: ClassVar[str] = "fold-cache"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[str]] = frozenset({"tib", "maintenance"})
    provides: ClassVar[frozenset[str]] = frozenset({"rows", "schedule"})
    preserves: ClassVar[frozenset[str]] = frozenset({"quantizer", "rows", "disturbance", "trajectory"})
    reaches: ClassVar[Stage] = Stage.FOLDED
    numerics: ClassVar[Numerics] = close(1e-5)
    data: ClassVar[frozenset[str]] = frozenset({"schedule"})

    mode: Literal["exact", "bias", "affine", "table"] = "exact"
    policy: Literal["recompute", "nearest", "error"] = "recompute"

    def moves(self, program: Program) -> Numerics:
        """Rounding alone where features are kept exactly; the maintenance may have chosen otherwise."""
        exact = {"fold", "table", "tib"}
        return self.numerics if all(set(r.strategy) <= exact for r in program.table(Maintenance).values()) else LOSSY

    def run(self, program: Program, ctx: Context) -> None:
        """Rewrite @step, outline @time, add tables."""
        assert ctx.schedule is not None
        before = sum(n.op == "call_function" for n in program.step.nodes)
        maintenance = dict(program.table(Maintenance))
        program.set_table(Schedule, {"schedule": Schedule(ctx.schedule.timesteps, self.policy, ctx.schedule.sampler)})
        program.tables.setdefault(RowSource.table, {})
        self._fold(program, maintenance)
        values = self._values(program, maintenance)
        if values or program.table(RowSource):
            self._rows(program, values, maintenance)
        _forget(program)
        program.drop_unread_parameters()
        after = sum(n.op == "call_function" for n in program.step.nodes)
        ctx.report.append(f"fold: {before} operations a step became {after}")

    def _fold(self, program: Program, maintenance: dict[str, Maintenance]) -> None:
        """Move features into the operations that read them; afterwards rows are what those operations take."""
        folded = {name for name, row in maintenance.items() if set(row.strategy) == {"fold"}}
        for node in program.nodes():
            made: list[fx.Node] = []
            if self.mode in ("exact", "bias"):
                made = fold_bias(program, node, folded)
            if not made and self.mode in ("exact", "affine"):
                made = fold_affine(program, node, folded)
            for value in made:
                maintenance[value.name] = Maintenance(("fold",))

    def _values(self, program: Program, maintenance: dict[str, Maintenance]) -> list[fx.Node]:
        """What the step reads and tables shall hold, in order."""
        roles = binding_times(program)
        waiting = {
            n
            for n in program.step.nodes
            if Role.TIME in roles[n.name] and Role.SAMPLE not in roles[n.name] and n.op == "call_function"
        }
        return [
            n
            for n in program.step.nodes
            if n in waiting
            and n.name in maintenance
            and set(maintenance[n.name].strategy) != {"tib"}
            and any(u not in waiting for u in n.users)
        ]

    def _rows(self, program: Program, values: list[fx.Node], maintenance: dict[str, Maintenance]) -> None:
        """Make tables of `values`, let the step read them, keep @time if something may call it."""
        sources = program.tables[RowSource.table]
        roles = binding_times(program)
        program.symbols.setdefault("R", 1)
        row = program.add_input("row", TensorType(torch.int64, ("R",)))
        sources["row"] = RowSource("row")
        if not values:
            return
        program.functions[TIME] = outline(program, values, {Role.TIME, Role.REQUEST})
        compile_time = [n for n in values if Role.REQUEST not in roles[n.name]]
        tables = _evaluate(program, values, compile_time)
        for output, node in enumerate(values):
            strategy = maintenance[node.name].strategy
            kept = None
            if "tib" in strategy:
                kept = _detach(program, node)
            if node in compile_time:
                read = _table(program, node, row, tables[node.name], strategy, output)
            else:
                read = _request_table(program, node, row, output, len(_timesteps(program)))
            if kept is not None:
                _switch(program, read, kept, row, strategy)
            _widen(program, read)
        keep = self.policy == "recompute" or len(compile_time) < len(values)
        if not keep:
            del program.functions[TIME]


def _timesteps(program: Program) -> tuple[float, ...]:
    return program.table(Schedule)["schedule"].timesteps


def _evaluate(program: Program, values: list[fx.Node], wanted: list[fx.Node]) -> dict[str, Tensor]:
    """Rows [T, ...] of the values that depend on the timestep alone, in full precision."""
    timesteps = _timesteps(program)
    if not program.has_weights or not wanted:
        shapes = {n.name: program.tensor_type(n) for n in wanted}
        return {
            name: torch.empty((len(timesteps), *type_.shape[1:]), dtype=type_.dtype, device="meta")  # type: ignore[arg-type]
            for name, type_ in shapes.items()
            if type_ is not None
        }
    scratch = Program({STEP: outline(program, wanted, {Role.TIME})}, program.tensors, program.inputs)
    t = torch.tensor(timesteps)
    with torch.no_grad():
        rows = scratch.module()(t.to(torch.int64) if bool((t == t.round()).all()) else t)
    return {n.name: value.contiguous() for n, value in zip(wanted, rows, strict=True)}


def _table(
    program: Program, node: fx.Node, row: fx.Node, rows: Tensor, strategy: tuple[str, ...], output: int
) -> fx.Node:
    """Turn a node into a read of a compile-time table; the coarsest encoding that any step asks for, or fp."""
    sources = program.tables[RowSource.table]
    name = f"table.{node.name}"
    wanted = {s for s in strategy if s != "tib"}
    if not wanted <= {"cache4", "cache8"}:
        if wanted & {"cache4", "cache8"} and not rows.is_meta:  # steps of several kinds share an fp table
            rows = torch.stack([_as_kept(r, strategy[i]) for i, r in enumerate(rows)])
        program.tensors[name] = rows
        sources[name] = RowSource("table", output)
        return _become(program, node, torch.ops.tfqc.table_read.default, (program.tensor_node(name), row))
    encoding = "int8" if "cache8" in wanted else "int4"
    if encoding == "int8" and "cache4" in wanted:
        rows = torch.stack([_as_kept(r, strategy[i]) for i, r in enumerate(rows)])
    encoded = [encode_row(r[None], encoding) for r in rows]
    parts = [torch.cat([e[i] for e in encoded]) for i in range(3)]
    names = [name, f"{name}.scale", f"{name}.zero_point"]
    program.tensors.update(dict(zip(names, parts, strict=True)))
    sources[name] = RowSource("table", output, encoding, names[1], names[2])
    operands = [program.tensor_node(n) for n in names]
    if encoding == "int8":
        return _become(program, node, torch.ops.tfqc.table_decode.default, (*operands, row))
    shape = list(rows.shape[1:])
    return _become(program, node, torch.ops.tfqc.table_decode_int4.default, (*operands, row, shape))


def _as_kept(row: Tensor, strategy: str) -> Tensor:
    """A row after the rounding of its strategy, in fp."""
    if not strategy.startswith("cache"):
        return row
    codes, scale, zero_point = encode_row(row[None], f"int{strategy.removeprefix('cache')}")
    first = torch.zeros(1, dtype=torch.int64)
    if strategy == "cache8":
        return torch.ops.tfqc.table_decode(codes, scale, zero_point, first)[0]
    return torch.ops.tfqc.table_decode_int4(codes, scale, zero_point, first, list(row.shape))[0]


def _request_table(program: Program, node: fx.Node, row: fx.Node, output: int, steps: int) -> fx.Node:
    type_ = program.tensor_type(node)
    assert type_ is not None
    table = program.add_input(f"table_{node.name}", TensorType(type_.dtype, (steps, *type_.shape)))
    program.tables[RowSource.table][table.name] = RowSource("time", output)
    return _become(program, node, torch.ops.tfqc.request_read.default, (table, row))


def _become(program: Program, node: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """Let a node compute the same value in another way: it keeps its name, its readers, its place."""
    node.target, node.args, node.kwargs = target, args, {}  # type: ignore[assignment]
    return node


def _detach(program: Program, node: fx.Node) -> fx.Node:
    """A copy of a node that goes on being computed at every step."""
    copied = program.insert(node, node.target, node.args, name=f"{node.name}_tib", like=node)
    copied.kwargs = dict(node.kwargs)
    return copied


def _switch(program: Program, read: fx.Node, kept: fx.Node, row: fx.Node, strategy: tuple[str, ...]) -> None:
    """Read the table at the steps that have a row there, the quantized TIB at the others."""
    name = f"mask.{read.name}"
    rank = len(program.tensor_type(read).shape) - 1  # type: ignore[union-attr]
    mask = torch.tensor([s != "tib" for s in strategy]).reshape(-1, *[1] * rank)
    program.tensors[name] = mask
    program.tables[RowSource.table][name] = RowSource("activation")
    after = read.next
    users = list(read.users)
    picked = program.insert(after, torch.ops.aten.index_select.default, (program.tensor_node(name), 0, row), like=read)
    chosen = program.insert(after, torch.ops.aten.where.self, (picked, read, kept), like=read)
    for user in users:
        user.replace_input_with(read, chosen)


def _widen(program: Program, read: fx.Node) -> None:
    """Readers that do not broadcast get a row for each batch entry."""
    type_ = program.tensor_type(read)
    if type_ is None or op_name(read.target) == "tfqc.request_read.default":
        return
    strict = [u for u in read.users if u.op == "output" or op_name(u.target) not in _BROADCASTS]
    strict = [u for u in strict if u.op == "output" or op_name(u.target) != "aten.where.self"]
    if not strict:
        return
    sample = program.node(program.input(Role.SAMPLE)[0].name)
    batch = program.insert(read, torch.ops.aten.sym_size.int, (sample, 0), like=read)
    sizes = [batch, *[-1] * (len(type_.shape) - 1)]
    wide = program.insert(read.next, torch.ops.aten.expand.default, (read, sizes), like=read)
    for user in strict:
        user.replace_input_with(read, wide)


def _forget(program: Program) -> None:
    """Quantizers of nodes that run in full precision now (in @time) are of no use any more."""
    alive = {n.name for f, g in program.functions.items() if f != TIME for n in g.nodes}
    _keep_rows(program, Quantizer.table, alive)
    for table in (Tib.table, BindingTime.table):
        program.tables.pop(table, None)


def _keep_rows(program: Program, table: str, names: Iterable[str]) -> None:
    kept = set(names)
    if table in program.tables:
        program.tables[table] = {k: v for k, v in program.tables[table].items() if k in kept}
