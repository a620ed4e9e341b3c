"""calibrate-activations: scales and zero points for the inputs of linears and convolutions."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from tfqc.analysis.binding import binding_times, edge_nodes
from tfqc.analysis.skipping import skipped
from tfqc.analysis.weighted import runs_quantized
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.ranges import Ranges
from tfqc.ir.match import is_call
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import Quantizer, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.ir.views import Conv
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.grid import Grid
from tfqc.quant.parameters import has_rows, quantizer_of, set_input_quantizer


@dataclass(frozen=True)
class CalibrateActivations(Pass):
    """Quantize the inputs of linears and convolutions: static, one row for each step, or dynamic for each token.

    Options: bits; mode; method of the range search; intervals (per step: how many rows the schedule shares, 0 = one
    for each step); edge-bits (of the model's first and last layer; none = as the others); scope (`tib`: only inside
    the temporal information block); skip (modules left in floating point, as `tfqc.analysis.skipping` reads them). Per
    token is for linears; convolutions have a row for each step there. An input that another pass has calibrated already
    keeps its parameters.
    """

    name: ClassVar[str] = "calibrate-activations"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource})
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
        """Add scales and zero points to the tensors, rows to `quantizer`, and to `rows` for per-step ones."""
        rows = program.tables.setdefault(Quantizer.table, {})
        program.tables.setdefault(RowSource.table, {})
        roles = binding_times(program)
        left = skipped(program, self.skip)
        wanted = [
            node
            for node in runs_quantized(program)
            if not quantizer_of(program, node).input_bits
            and (self.scope == "all" or node.name in program.table(Tib))
            and node not in left
        ]
        dynamic = [n for n in wanted if self.mode == "per-token" and is_call(n, torch.ops.aten.linear.default)]
        for node in dynamic:
            row = quantizer_of(program, node)
            rows[node.name] = dataclasses.replace(row, input_bits=self.bits, input_how="per-token")
        static = [n for n in wanted if n not in dynamic]
        edges = edge_nodes(program) if self.edge_bits is not None else []
        observer = Ranges.for_method(self.method, len(ctx.need_schedule()))
        ranges = observe(program, {v: (v, observer) for v in (n.all_input_nodes[0].name for n in static)}, ctx)
        for node in static:
            value = node.all_input_nodes[0]
            # What waits for nothing but the request runs once per image, where there are no steps.
            waits = bool(roles[node.name] & {Role.SAMPLE, Role.TIME})
            per_step = self.mode != "static" and waits and has_rows(program, value)
            bits = self.edge_bits if self.edge_bits is not None and node in edges else self.bits
            grid = Grid(bits, symmetric=False)
            scale, zero_point = ranges[value.name].qparams(grid, self.method, per_step, self.intervals)
            how = f"{'per-step' if per_step else 'static'} {self.method}"
            set_input_quantizer(program, node, bits, scale, zero_point, how)
