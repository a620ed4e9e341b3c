"""learn-time-scales: TDQ, the step of each activation's quantizer as a learned function of the timestep."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import fx

from tfqc.analysis.weighted import runs_quantized, weight_of
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.moments import has_moments, steps_looked_at
from tfqc.calibration.observers.samples import SampledRows, Samples
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.adaround import Optimizer
from tfqc.quant.formats import QuantSpec
from tfqc.quant.parameters import quantizer_of, set_input_quantizer, set_protected, stored_weight
from tfqc.quant.plan import fillable, protected_steps
from tfqc.quant.planning import Inputs, plan
from tfqc.quant.scale_fit import Curves, Layer, fit
from tfqc.quant.time_scales import Codes, Grids, Networks, TimeScales, rows, untrained


@dataclass(frozen=True)
class LearnTimeScales(Pass):
    """TDQ (arXiv 2306.02316): the step of each input's quantizer is a learned function of the timestep.

    s(t) = Softplus(MLP(sinusoid(t))) is fitted to the error in the outputs of the linears and convolutions that read
    the input, then evaluated into a row for each step of the schedule. The networks stay beside the rows: a compiled
    model computes the steps of other timesteps by them. Finds parameters for inputs that are planned so (`range=tdq`)
    and have a row for each step; grouped convolutions and what waits for no step are left to calibrate-activations.
    Weights that are quantized already are taken as they are. Options: grid (`full`: all codes; `released`: those of
    the paper's code, -6 .. 6 of 4 bits); steps of the schedule at which inputs are looked at; iterations;
    learning-rate of Adam; optimizer (`stquant` keeps Adam's moments in few bits). Others plan the inputs that nothing
    is planned for: bits; edge-bits (of the model's first and last layer; none = as the others); scope (`tib`: only
    inside the temporal information block); skip (modules left to other passes, as `tfqc.analysis.skipping` reads
    them).
    """

    name: ClassVar[str] = "learn-time-scales"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource, QuantPlan, TimeScales})
    data: ClassVar[frozenset[str]] = frozenset({"sampler", "calibration", "weights"})

    bits: int = 8
    grid: Grids = "full"
    steps: int = 20
    iterations: int = 500
    learning_rate: float = 0.005
    optimizer: Optimizer = "adam"
    edge_bits: int | None = None
    scope: Literal["all", "tib"] = "all"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, self.bits if self.edge_bits is None else self.edge_bits):
            if not 3 <= bits <= 8:
                raise ValueError(f"bits={bits} is out of range: learned steps are of grids of 3 to 8 bits")
        for what, count in (("steps", self.steps), ("iterations", self.iterations)):
            if count < 1:
                raise ValueError(f"{what}={count}: at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning-rate={self.learning_rate}: a positive number")

    def contract(self) -> Contract:
        """The block has to be known where it alone is quantized."""
        return replace(super().contract(), requires=frozenset({Tib} if self.scope == "tib" else ()))

    def run(self, program: Program, ctx: Context) -> None:
        """Add [T] scales and zero points and the networks to the tensors, rows to `quantizer`, `rows`, `plan` and
        `time-scales`."""
        for table in (Quantizer.table, RowSource.table, TimeScales.table):
            program.tables.setdefault(table, {})
        found = self._planned(program, ctx)
        if not found:
            return
        count = len(ctx.need_schedule())
        wishes = {n.name: (n.all_input_nodes[0].name, Samples.of(program, n, count, self.steps)) for n in found}
        seen = observe(program, wishes, ctx)
        # One network for all readers of a value that are planned alike.
        alike: dict[tuple[str, QuantSpec], list[fx.Node]] = {}
        for node, spec in found.items():
            alike.setdefault((node.all_input_nodes[0].name, replace(spec, by="", why="")), []).append(node)
        grids = [
            Codes.of(spec.format.bits, self.grid, seen[nodes[0].name].low, seen[nodes[0].name].high)
            for (_, spec), nodes in alike.items()
        ]
        networks = self._learned(program, ctx, list(alike.values()), seen, grids)
        scales, zero_points = rows(networks, ctx.need_schedule().timesteps)
        for (_, spec), nodes, grid, scale, zero in zip(alike, alike.values(), grids, scales, zero_points, strict=True):
            for node in nodes:
                bits = spec.format.bits
                top = 0 if grid.top == 2**bits - 1 else grid.top
                set_input_quantizer(program, node, bits, scale, zero, f"per-step tdq {self.grid}", top)
                set_protected(program, node, protected_steps(program, node, "input"))
        if count == 1:
            return  # no row, one step for all times
        table = program.tables[TimeScales.table]
        first = [quantizer_of(program, nodes[0]) for nodes in alike.values()]
        names = program.add_tensors("tdq", networks.tensors())
        table[str(len(table))] = TimeScales(
            dict(zip(networks.tensors(), names, strict=True)),
            tuple(row.input_scale for row in first),
            tuple(row.input_zero_point for row in first),
        )

    def _planned(self, program: Program, ctx: Context) -> dict[fx.Node, QuantSpec]:
        """Nodes whose input is to have learned steps."""
        nodes = [n for n in runs_quantized(program) if has_moments(n) and not quantizer_of(program, n).input_bits]
        options = Inputs(self.bits, "tdq", "per-step", edges=self.edge_bits)
        plan(program, ctx, self, options, nodes, scope=self.scope, skip=self.skip)
        found = {n: spec for n in nodes if (spec := fillable(program, n, "input", self.name)) is not None}
        return {n: spec for n, spec in found.items() if spec.range == "tdq" and spec.per == "step"}

    def _learned(
        self,
        program: Program,
        ctx: Context,
        readers: list[list[fx.Node]],
        seen: dict[str, SampledRows],
        grids: list[Codes],
    ) -> Networks:
        """A network for each list of nodes that read one value."""
        timesteps = ctx.need_schedule().timesteps
        if ctx.rehearsal:
            ones = torch.ones(len(readers), dtype=torch.float32)
            return untrained(ones, ones, grids, timesteps, ctx.seed)
        looked_at = sorted(steps_looked_at(len(timesteps), self.steps))
        units: list[float] = []
        curves: list[Curves] = []
        jobs = list(zip(readers, grids, strict=True))
        for nodes, grid in ctx.progress.track(jobs, "measuring errors of steps (TDQ)", len(jobs)):
            values = torch.cat([seen[n.name].rows[s].flatten() for n in nodes for s in looked_at])
            units.append(float(values.std(correction=0)) or 1.0)
            protected = protected_steps(program, nodes[0], "input")
            rows_of = [[seen[n.name].rows[s] for n in nodes] for s in looked_at]
            left_out = [bool(protected) and protected[s] for s in looked_at]
            curves.append(Curves.of(rows_of, [_layer(program, n) for n in nodes], grid, left_out))
        times = [timesteps[s] for s in looked_at]
        found = torch.tensor([c.single() for c in curves], dtype=torch.float32)
        singles, errors_of_singles = found.unbind(1)
        start = untrained(singles, torch.tensor(units, dtype=torch.float32), grids, times, ctx.seed)
        bar = ctx.progress.track(range(self.iterations), "learning steps (TDQ)")
        networks, errors = fit(
            start,
            curves,
            times,
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            on_iteration=lambda: next(bar, None),
        )
        for _ in bar:
            pass
        each = sum(c.least() for c in curves) / len(curves)
        single, learned = float(errors_of_singles.mean()), float(errors.mean())
        ctx.remark("time-scales", inputs=len(curves), learned=learned, single=single, each=each)
        return networks


def _layer(program: Program, node: fx.Node) -> Layer:
    """The weight of a node, as it is and as it is quantized."""
    weight = program.tensors[weight_of(node) or ""].detach().float().flatten(1)
    row = quantizer_of(program, node)
    return Layer(weight, stored_weight(program, row).flatten(1) if row.codes else weight)
