"""calibrate-activations: scales and zero points for the inputs of linears and convolutions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from tfqc.analysis.weighted import runs_quantized
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.ranges import Ranges
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.ir.views import Conv
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.parameters import quantizer_of, set_input_quantizer, set_protected
from tfqc.quant.plan import fillable, protected_steps
from tfqc.quant.planning import Inputs, plan


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """Quantize the inputs of linears and convolutions: static, one row for each step, or dynamic for each token.

    An input that another pass has calibrated already keeps its parameters. Options plan the inputs that nothing is
    planned for: bits; mode; method of the range search; intervals (per step: how many rows the schedule shares, 0 = one
    for each step); edge-bits (of the model's first and last layer; none = as the others); scope (`tib`: only inside
    the temporal information block); skip (modules left to other passes, as `tfqc.analysis.skipping` reads them). Per
    token is for linears; convolutions have a row for each step there.
    """

    name: ClassVar[str] = "calibrate-activations"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource, QuantPlan})
    reaches: ClassVar[Stage] = Stage.CALIBRATED
    data: ClassVar[frozenset[str]] = frozenset({"sampler", "calibration", "weights"})

    bits: int = 8
    mode: Literal["static", "per-step", "per-token"] = "static"
    method: Literal["min-max", "mse"] = "min-max"
    intervals: int = 0
    edge_bits: int | None = None
    scope: Literal["all", "tib"] = "all"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, self.bits if self.edge_bits is None else self.edge_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"bits={bits} is out of range: activations have 2 to 8 bits")
        if self.intervals < 0:
            raise ValueError(f"intervals={self.intervals} is negative")

    def contract(self) -> Contract:
        """The block has to be known where it alone is quantized."""
        return dataclasses.replace(super().contract(), requires=frozenset({Tib} if self.scope == "tib" else ()))

    def draws_on(self, program: Program) -> frozenset[str]:
        """Per token, linears need nothing: only convolutions are looked at."""
        dynamic = self.mode == "per-token" and not any(Conv.of(n) for n in program.step.nodes)
        return frozenset() if dynamic else super().draws_on(program)

    def run(self, program: Program, ctx: Context) -> None:
        """Add scales and zero points to the tensors, rows to `quantizer`, `plan`, and to `rows` for per-step ones."""
        rows = program.tables.setdefault(Quantizer.table, {})
        program.tables.setdefault(RowSource.table, {})
        nodes = [n for n in runs_quantized(program) if not quantizer_of(program, n).input_bits]
        options = Inputs(self.bits, self.method, self.mode, self.intervals, self.edge_bits)
        plan(program, ctx, self, options, nodes, scope=self.scope, skip=self.skip)
        found = {n: spec for n in nodes if (spec := fillable(program, n, "input", self.name)) is not None}
        for node, spec in found.items():
            if spec.per == "token":
                row = quantizer_of(program, node)
                rows[node.name] = dataclasses.replace(row, input_bits=spec.format.bits, input_how="per-token")
        protected = {n: protected_steps(program, n, "input") for n in found}
        for node, steps in protected.items():
            set_protected(program, node, steps)
        static = [n for n, spec in found.items() if spec.per != "token"]
        if not static:
            return
        searched = any(found[n].method == "mse" for n in static)
        observer = Ranges.for_method("mse" if searched else "min-max", len(ctx.need_schedule()))
        ranges = observe(program, {v: (v, observer) for v in (n.all_input_nodes[0].name for n in static)}, ctx)
        for node in static:
            spec = found[node]
            parameters = ranges[node.all_input_nodes[0].name].qparams(
                spec.grid, spec.method, spec.per == "step", spec.intervals, protected[node]
            )
            how = f"{'per-step' if spec.per == 'step' else 'static'} {spec.method}"
            set_input_quantizer(program, node, spec.format.bits, *parameters, how)
