"""reconstruct-weights: GPTQ, rounding that lets the rest of a layer's weights make up for each error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tfqc.analysis.weighted import runs_quantized, weight_of
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.moments import Moments, has_moments
from tfqc.calibration.results import Result
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Pass
from tfqc.quant.formats import QuantSpec
from tfqc.quant.gptq import BLOCK, DAMPING, gptq
from tfqc.quant.grid import QuantizedWeight, quantize_weight, without_values
from tfqc.quant.parameters import quantizer_of, set_weight_quantizer
from tfqc.quant.plan import fillable
from tfqc.quant.planning import Weights, plan


@dataclass(frozen=True)
class ReconstructWeights(Pass):
    """Round the weights outside the TIB by GPTQ on calibration data, with scales per channel or per group.

    The TIB has a reconstruction of its own (reconstruct-tib), so strategies differ in nothing but the TIB. Grouped
    convolutions are left to calibrate-weights. Options: steps of the schedule at which inputs are looked at. Others
    plan the weights that nothing is planned for: bits; method of the range search; group; edge-bits (for the model's
    first and last layer; none = as the others); scope (`linear`: only linears and convolutions of 1 x 1); skip (modules
    left to other passes, as `tfqc.analysis.skipping` reads them).
    """

    name: ClassVar[str] = "reconstruct-weights"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, QuantPlan})
    data: ClassVar[frozenset[str]] = frozenset({"sampler", "calibration", "weights"})

    bits: int = 4
    method: Literal["min-max", "mse"] = "mse"
    group: int | None = None
    edge_bits: int | None = None
    scope: Literal["all", "linear"] = "all"
    steps: int = 10
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, self.bits if self.edge_bits is None else self.edge_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"bits={bits} is out of range: weights have 2 to 8 bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: at least one column")
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: at least 1")

    def run(self, program: Program, ctx: Context) -> None:
        """Add codes, scales and zero points to the tensors, and rows to `quantizer` and `plan`."""
        program.tables.setdefault(Quantizer.table, {})
        nodes = [
            n
            for n in runs_quantized(program)
            if n.name not in program.table(Tib) and has_moments(n) and not quantizer_of(program, n).codes
        ]
        options = Weights(self.bits, self.method, self.group, edges=self.edge_bits)
        plan(program, ctx, self, options, nodes, scope=self.scope, skip=self.skip)
        specs = {n.name: spec for n in nodes if (spec := fillable(program, n, "weight", self.name)) is not None}
        nodes = [n for n in nodes if n.name in specs]
        observers = {n: Moments.of(program, n, len(ctx.need_schedule()), self.steps) for n in nodes}
        # Readers of one weight that round it alike have one set of codes, for the inputs of all of them.
        alike: dict[tuple[str, QuantSpec], list[str]] = {}
        for node in nodes:
            key = (weight_of(node) or "", replace(specs[node.name], by="", why=""))
            alike.setdefault(key, []).append(node.name)
        moments = observe(program, {n.name: (n.all_input_nodes[0].name, o) for n, o in observers.items()}, ctx)
        for node in ctx.progress.track(nodes, "reconstructing weights (GPTQ)", len(nodes)):
            name = weight_of(node)
            assert name is not None
            weight = program.tensors[name]
            spec = specs[node.name]
            grid, group, how = spec.grid, spec.group or None, f"gptq {spec.how}"
            if ctx.rehearsal:
                set_weight_quantizer(program, node, name, without_values(weight, grid, group), how)
                continue
            if not bool(torch.isfinite(weight).all()):
                raise CalibrationError(f"Weight @{name} of {program.at(node)} holds NaN or infinity.")
            nearest = quantize_weight(weight, grid, spec.method, group)
            readers = alike[name, replace(spec, by="", why="")]
            seen = moments[node.name] if len(readers) == 1 else torch.stack([moments[r] for r in readers]).mean(0)
            set_weight_quantizer(program, node, name, _rounded(weight, seen, nearest, how, ctx), how)


def _rounded(weight: Tensor, moments: Tensor, nearest: QuantizedWeight, how: str, ctx: Context) -> QuantizedWeight:
    """By GPTQ; what is in the working directory is not rounded again."""
    given = {"weight": weight, "moments": moments, "scale": nearest.scale, "zero_point": nearest.zero_point}
    kept = Result(ctx.workdir, "rounded", f"{how} {nearest.grid} {nearest.group} {DAMPING} {BLOCK}", given)
    if (read := kept.read()) is not None and read["codes"].shape == nearest.q.shape:
        return replace(nearest, q=read["codes"])
    found = gptq(weight, moments, nearest)
    kept.write({"codes": found.q})
    return found
