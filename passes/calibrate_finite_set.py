"""calibrate-finite-set: FSC, one (scale, zero point) for each timestep, for the activations inside the TIB."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from tfqc.analysis.weighted import runs_quantized, tib_weighted
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.ranges import Ranges, StepRanges
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.grid import range_to_qparams
from tfqc.quant.parameters import has_rows, set_input_quantizer, set_protected
from tfqc.quant.plan import fillable, protected_steps
from tfqc.quant.planning import Inputs, plan
from tfqc.temporal.features import tib_run


@dataclass(frozen=True)
class CalibrateFiniteSet(Pass):
    """FSC: the schedule is finite, so every activation gets one scale and zero point for each of its timesteps.

    Finds parameters for inputs that are planned so (`range=fsc`): those inside the temporal information block, as in
    the paper; in scope `all` those of the whole network, as in its code. Options plan inputs that nothing is planned
    for: bits; scope; intervals (rows that the schedule shares in scope `all`, 0 = one for each step). Ranges are
    min-max.
    """

    name: ClassVar[str] = "calibrate-finite-set"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource, QuantPlan})
    data: ClassVar[frozenset[str]] = frozenset({"schedule", "weights"})

    bits: int = 8
    scope: Literal["tib", "all"] = "tib"
    intervals: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range: activations have 2 to 8 bits")
        if self.intervals < 0:
            raise ValueError(f"intervals={self.intervals} is negative")

    def contract(self) -> Contract:
        """The whole network is sampled, the block alone computed."""
        its = super().contract()
        return replace(its, data=its.data | {"sampler", "calibration"}) if self.scope == "all" else its

    def run(self, program: Program, ctx: Context) -> None:
        """Add [T] scales and zero points to the tensors, rows to `quantizer`, `rows` and `plan`."""
        block = tib_weighted(program)
        others = [n for n in runs_quantized(program) if n not in block] if self.scope == "all" else []
        plan(program, ctx, self, Inputs(self.bits, "fsc", "per-step"), block)
        plan(program, ctx, self, Inputs(self.bits, "fsc", "per-step", self.intervals), others)
        specs = {n: s for n in (*block, *others) if (s := fillable(program, n, "input", self.name)) is not None}
        specs = {n: s for n, s in specs.items() if s.range == "fsc"}
        program.tables.setdefault(Quantizer.table, {})
        program.tables.setdefault(RowSource.table, {})
        ends = self._of_block(program, ctx, [n for n in block if n in specs])
        ranges: dict[str, StepRanges] = {}
        if read := [n.all_input_nodes[0].name for n in others if n in specs]:
            observer = Ranges(len(ctx.need_schedule()))
            ranges = observe(program, {v: (v, observer) for v in read}, ctx)
        for node, spec in specs.items():
            value, per_step = node.all_input_nodes[0].name, spec.per == "step"
            if node in others:
                found = ranges[value].qparams(spec.grid, "min-max", per_step, spec.intervals)
            elif value in ends:
                low, high = ends[value]
                low, high = (low, high) if per_step else (low.amin(0, True), high.amax(0, True))
                found = range_to_qparams(low, high, spec.grid)
            else:
                continue
            how = "per-step fsc" if found[0].numel() > 1 else "static min-max"
            set_input_quantizer(program, node, spec.format.bits, *found, how)
            set_protected(program, node, protected_steps(program, node, "input"))

    def _of_block(self, program: Program, ctx: Context, nodes: list[fx.Node]) -> dict[str, tuple[Tensor, Tensor]]:
        """Least and greatest values of what the block's linears and convolutions read, by the value's name."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        if not nodes:
            return found
        read = {n.name: n.all_input_nodes[0] for n in nodes}
        run = tib_run(program, ctx)

        def see(name: str, value: Tensor) -> None:
            if name not in read:
                return
            rows = value.detach().reshape(run.steps if has_rows(program, read[name]) else 1, -1)
            if not bool(torch.isfinite(rows).all()):
                where = program.at(program.node(name))
                raise CalibrationError(f"The input of {where} is NaN or infinite: the model is broken there.")
            found[read[name].name] = rows.amin(1), rows.amax(1)

        if ctx.rehearsal:
            for value in read.values():
                steps = run.steps if has_rows(program, value) else 1
                found[value.name] = -torch.ones(steps), torch.ones(steps)
        else:
            with torch.no_grad():
                run(observe=see)
        return found
