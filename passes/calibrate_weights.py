"""calibrate-weights: integer codes and scales for the weight of every linear and convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tfqc.analysis.weighted import runs_quantized, weight_of
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.formats import QuantSpec
from tfqc.quant.grid import QuantizedWeight, quantize_weight, without_values
from tfqc.quant.parameters import quantizer_of, set_weight_quantizer
from tfqc.quant.plan import fillable
from tfqc.quant.planning import Weights, plan


@dataclass(frozen=True)
class CalibrateWeights(Pass):
    """Quantize weights per output channel or per group, with min-max or MSE ranges.

    A weight that another pass has quantized already keeps its codes. Options plan the weights that nothing is planned
    for: bits; method of the range search; group (columns that share a scale, none = per channel); symmetric; edge-bits
    (for the model's first and last layer; none = as the others); scope (`tib`: only inside the temporal information
    block; `linear`: only linears and convolutions of 1 x 1); skip (modules left to other passes, as
    `tfqc.analysis.skipping` reads them).
    """

    name: ClassVar[str] = "calibrate-weights"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, QuantPlan})
    reaches: ClassVar[Stage] = Stage.CALIBRATED

    bits: int = 8
    method: Literal["min-max", "mse"] = "min-max"
    group: int | None = None
    symmetric: bool = True
    edge_bits: int | None = None
    scope: Literal["all", "tib", "linear"] = "all"
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for bits in (self.bits, self.bits if self.edge_bits is None else self.edge_bits):
            if not 2 <= bits <= 8:
                raise ValueError(f"bits={bits} is out of range: weights have 2 to 8 bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: at least one column")

    def contract(self) -> Contract:
        """The block has to be known where it alone is quantized."""
        return replace(super().contract(), requires=frozenset({Tib} if self.scope == "tib" else ()))

    def run(self, program: Program, ctx: Context) -> None:
        """Add codes, scales and zero points to the tensors, and rows to `quantizer` and `plan`."""
        program.tables.setdefault(Quantizer.table, {})
        nodes = [n for n in runs_quantized(program) if not quantizer_of(program, n).codes]
        options = Weights(self.bits, self.method, self.group, symmetric=self.symmetric, edges=self.edge_bits)
        plan(program, ctx, self, options, nodes, scope=self.scope, skip=self.skip)
        for node in ctx.progress.track(nodes, "quantizing weights", len(nodes)):
            spec, weight = fillable(program, node, "weight", self.name), weight_of(node)
            if spec is not None and weight is not None:
                quantized = _quantize(program.tensors[weight], spec, f"@{weight} of {program.at(node)}")
                set_weight_quantizer(program, node, weight, quantized, spec.how)


def _quantize(weight: Tensor, spec: QuantSpec, where: str) -> QuantizedWeight:
    if weight.is_meta:
        return without_values(weight, spec.grid, spec.group or None)
    if not bool(torch.isfinite(weight).all()):
        raise CalibrationError(f"Weight {where} holds NaN or infinity: the model is broken there.")
    return quantize_weight(weight, spec.grid, spec.method, spec.group or None)
