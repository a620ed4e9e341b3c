"""fold-cache: temporal features become table rows, or constants of the operation that reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, fx

from tfqc.analysis.binding import binding_table, binding_times
from tfqc.analysis.outline import add_outlined
from tfqc.ir.edit import Rewriter
from tfqc.ir.program import TIME, Input, Program, Role, Stage
from tfqc.ir.rows import BindingTime, Maintenance, Quantizer, RowSource, Schedule, Tib
from tfqc.ir.tables import Fact, Row
from tfqc.passing import LOSSY, Context, Numerics, Pass, close
from tfqc.quant.time_scales import TimeScales
from tfqc.temporal.fold import fold_affine, fold_bias
from tfqc.temporal.reads import RowIndices, become_request_read, become_table_read, detach, switch, widen
from tfqc.temporal.tabulate import feature_rows, label_of
from tfqc.temporal.time_scales import scales_join_time


@dataclass(frozen=True)
class FoldCache(Pass):
    """Take the TIB out of the step: each feature becomes what its maintenance says.

    `fold`: exact, as the per-step bias of the convolution before it, or the per-step affine of the norm before it,
    where the graph allows, else an fp table; `table`: an fp table; `cache4`, `cache8`: a quantized table; `tib`:
    it stays. Features that depend on class labels with a declared domain have a row for each label at each timestep.
    Those that depend on other request inputs become tables built once per image, in full precision. Networks that give
    the steps of quantizers (learn-time-scales) are kept for timesteps that are computed later.

    Options: mode (restricts `fold` to `bias`, `affine` or plain `table`s; `exact` = all); policy for timesteps that are
    not in the schedule.
    """

    name: ClassVar[str] = "fold-cache"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib, Maintenance})
    provides: ClassVar[frozenset[Fact]] = frozenset({RowSource, Schedule, BindingTime})
    preserves: ClassVar[frozenset[type[Row]]] = frozenset({Tib, Quantizer})
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
        schedule = ctx.need_schedule()
        before = sum(n.op == "call_function" for n in program.step.nodes)
        maintenance = dict(program.table(Maintenance))
        kept = Schedule(schedule.timesteps, self.policy, schedule.sampler)
        program.set_table(Schedule, {"schedule": kept} if program.input(Role.TIME) else {})
        program.tables.setdefault(RowSource.table, {})
        self._fold(program, maintenance)
        values = self._values(program, maintenance)
        if values or program.table(RowSource):
            self._rows(program, values, maintenance)
        _forget(program)
        if self.policy == "recompute":
            scales_join_time(program)
        program.tables.get(TimeScales.table, {}).clear()  # what is computed in @time says so itself
        program.drop_unread_parameters()
        program.set_table(BindingTime, binding_table(program))
        after = sum(n.op == "call_function" for n in program.step.nodes)
        ctx.remark("folded", before=before, after=after)

    def _fold(self, program: Program, maintenance: dict[str, Maintenance]) -> None:
        """Move features into the operations that read them; afterwards rows are what those operations take."""
        folded = {name for name, row in maintenance.items() if set(row.strategy) == {"fold"}}
        edit = Rewriter(program)
        for node in program.nodes():
            made: list[fx.Node] = []
            if self.mode in ("exact", "bias"):
                made = fold_bias(edit, node, folded)
            if not made and self.mode in ("exact", "affine"):
                made = fold_affine(edit, node, folded)
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
        """Make tables of `values`, let the step read them, keep @time for what may have to be computed later."""
        roles = binding_times(program)
        labels = label_of(program, values)
        per_request = [n for n in values if Role.REQUEST in roles[n.name] and labels[n.name] is None]
        outputs = values if self.policy == "recompute" else per_request
        indices = RowIndices(program)
        if not values:
            return
        if outputs:
            add_outlined(program, TIME, outputs, {Role.TIME, Role.REQUEST})
        tables = _evaluate(program, [n for n in values if n not in per_request], labels)
        for node in values:
            strategy = maintenance[node.name].strategy
            output = outputs.index(node) if node in outputs else -1
            kept = detach(program, node) if "tib" in strategy else None
            if node in per_request:
                become_request_read(program, node, indices.plain, output)
            else:
                label = labels[node.name]
                become_table_read(program, node, indices.of(label), tables[node.name], strategy, output, label)
            if kept is not None:
                switch(program, node, kept, indices.plain, strategy)
            if node not in per_request and labels[node.name] is None:
                widen(program, node)


def _evaluate(program: Program, nodes: list[fx.Node], labels: dict[str, Input | None]) -> dict[str, Tensor]:
    """Rows of all compile-time tables."""
    timesteps = program.table(Schedule)["schedule"].timesteps
    tables: dict[str, Tensor] = {}
    for name in dict.fromkeys(label.name if label else "" for label in labels.values()):
        label = next((i for i in program.inputs if i.name == name), None)
        tables |= feature_rows(program, [n for n in nodes if labels[n.name] == label], timesteps, label)
    return tables


def _forget(program: Program) -> None:
    """Quantizers of nodes that run in full precision now (in @time) are of no use any more."""
    alive = {n.name for f, g in program.functions.items() if f != TIME for n in g.nodes}
    if Quantizer.table in program.tables:
        quantizers = program.tables[Quantizer.table]
        program.tables[Quantizer.table] = {k: v for k, v in quantizers.items() if k in alive}
