"""calibrate-finite-set: FSC, one (scale, zero point) for each timestep, for the activations inside the TIB."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tfqc.analysis.binding import binding_times
from tfqc.analysis.weighted import runs_quantized, tib_weighted
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.ranges import Ranges
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import Quantizer, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.grid import Grid, range_to_qparams
from tfqc.quant.parameters import has_rows, set_input_quantizer
from tfqc.temporal.features import tib_run


@dataclass(frozen=True)
class CalibrateFiniteSet(Pass):
    """FSC: the schedule is finite, so every activation gets one scale and zero point for each of its timesteps.

    Options: bits; scope (`tib`: inside the temporal information block, as in the paper; `all`: the whole network, as
    in its code); intervals (rows that the schedule shares in scope `all`, 0 = one for each step). Ranges are min-max.
    """

    name: ClassVar[str] = "calibrate-finite-set"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource})
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
        """Add [T] scales and zero points to the tensors, rows to `quantizer` and `rows`."""
        grid = Grid(self.bits, symmetric=False)
        nodes = {n.name: n.all_input_nodes[0].name for n in tib_weighted(program)}
        roles = binding_times(program)
        found = self._of_block(program, ctx, grid)
        if self.scope == "all":
            others = [n for n in runs_quantized(program) if n.name not in nodes]
            nodes |= {n.name: n.all_input_nodes[0].name for n in others}
            stepped = {
                n.all_input_nodes[0].name
                for n in others
                if not roles[n.name] <= {Role.REQUEST} and has_rows(program, n.all_input_nodes[0])
            }
            read, observer = (n.all_input_nodes[0].name for n in others), Ranges(len(ctx.need_schedule()))
            for value, ranges in observe(program, {v: (v, observer) for v in read}, ctx).items():
                found[value] = ranges.qparams(grid, "min-max", value in stepped, self.intervals)
        program.tables.setdefault(Quantizer.table, {})
        program.tables.setdefault(RowSource.table, {})
        for name, value in nodes.items():
            if value in found:
                how = "per-step fsc" if found[value][0].numel() > 1 else "static min-max"
                set_input_quantizer(program, program.node(name), self.bits, *found[value], how)

    def _of_block(self, program: Program, ctx: Context, grid: Grid) -> dict[str, tuple[Tensor, Tensor]]:
        """Scales and zero points of the values that the block's linears and convolutions read, by name."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        nodes = {n.name: n.all_input_nodes[0] for n in tib_weighted(program)}
        run = tib_run(program, ctx)

        def observe(name: str, value: Tensor) -> None:
            rows = value.detach().reshape(run.steps if has_rows(program, nodes[name]) else 1, -1)
            if not bool(torch.isfinite(rows).all()):
                where = program.at(program.node(name))
                raise CalibrationError(f"The input of {where} is NaN or infinite: the model is broken there.")
            found[nodes[name].name] = range_to_qparams(rows.amin(1), rows.amax(1), grid)

        if ctx.rehearsal:
            for value in nodes.values():
                steps = run.steps if has_rows(program, value) else 1
                found[value.name] = range_to_qparams(-torch.ones(steps), torch.ones(steps), grid)
        else:
            with torch.no_grad():
                run(observe=observe)
        return found
