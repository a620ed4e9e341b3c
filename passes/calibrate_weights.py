"""calibrate-weights: integer codes and scales for the weight of every linear and convolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tfqc.analysis.binding import edge_nodes
from tfqc.analysis.skipping import skipped
from tfqc.analysis.weighted import is_linear, runs_quantized, weight_of
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.grid import Grid, QuantizedWeight, quantize_weight, without_values
from tfqc.quant.parameters import quantizer_of, set_weight_quantizer


@dataclass(frozen=True)
class CalibrateWeights(Pass):
    """Quantize weights per output channel or per group, with min-max or MSE ranges.

    Options: bits; method of the range search; group (columns that share a scale, none = per channel); symmetric;
    edge-bits (for the model's first and last layer; none = as the others); scope (`tib`: only inside the temporal
    information block; `linear`: only linears and convolutions of 1 x 1); skip (modules left in floating point, as
    `tfqc.analysis.skipping` reads them). A weight that another pass has quantized already keeps its codes.
    """

    name: ClassVar[str] = "calibrate-weights"
    needs: ClassVar[Stage] = Stage.ANALYZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer})
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
        """Add codes, scales and zero points to the tensors, and rows to `quantizer`."""
        program.tables.setdefault(Quantizer.table, {})
        tib = program.table(Tib)
        nodes = [n for n in runs_quantized(program) if self.scope != "tib" or n.name in tib]
        nodes = [n for n in nodes if self.scope != "linear" or is_linear(program, n)]
        edges = edge_nodes(program) if self.edge_bits is not None else []
        left = skipped(program, self.skip)
        for node in ctx.progress.track(nodes, "quantizing weights", len(nodes)):
            if quantizer_of(program, node).codes or node in left:
                continue
            weight = weight_of(node)
            assert weight is not None
            bits = self.edge_bits if self.edge_bits is not None and node in edges else self.bits
            quantized = self._quantize(program.tensors[weight], bits, f"@{weight} of {program.at(node)}")
            how = self.method + (f" group {self.group}" if self.group else "")
            set_weight_quantizer(program, node, weight, quantized, how + ("" if self.symmetric else " asymmetric"))

    def _quantize(self, weight: Tensor, bits: int, where: str) -> QuantizedWeight:
        grid = Grid(bits, self.symmetric)
        if weight.is_meta:
            return without_values(weight, grid, self.group)
        if not bool(torch.isfinite(weight).all()):
            raise CalibrationError(f"Weight {where} holds NaN or infinity: the model is broken there.")
        return quantize_weight(weight, grid, self.method, self.group)
