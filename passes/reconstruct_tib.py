"""reconstruct-tib: TIAR, joint AdaRound of all TIB weights against the full-precision temporal features."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tfqc.analysis.weighted import tib_weighted, weight_of
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Pass
from tfqc.quant.adaround import Optimizer, SoftRounding, reconstruct
from tfqc.quant.formats import QuantSpec
from tfqc.quant.grid import QuantizedWeight, quantize_weight, without_values
from tfqc.quant.parameters import input_fake_quantizer, quantizer_of, set_weight_quantizer
from tfqc.quant.plan import fillable
from tfqc.quant.planning import Weights, plan
from tfqc.temporal.features import tib_run


@dataclass(frozen=True)
class ReconstructTib(Pass):
    """TIAR: minimise Σ_i ‖g_i(h(t)) − ĝ_i(ĥ(t))‖² over the rounding of all weights in the TIB, and nothing else.

    Trains on the distinct timesteps of the schedule as one full batch. Activations are quantized on the way if an
    earlier pass (FSC) calibrated them. Keeps rounding to nearest if training did not beat it. Options: iterations;
    learning-rate of Adam; optimizer (`stquant` keeps Adam's moments in few bits). Others plan the weights that nothing
    is planned for: bits; method of the range search.
    """

    name: ClassVar[str] = "reconstruct-tib"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib})
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, QuantPlan})
    data: ClassVar[frozenset[str]] = frozenset({"schedule", "weights"})

    bits: int = 4
    method: Literal["min-max", "mse"] = "mse"
    iterations: int = 1000
    learning_rate: float = 0.01
    optimizer: Optimizer = "adam"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} is out of range: weights have 2 to 8 bits")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning-rate={self.learning_rate}: a positive number")

    def run(self, program: Program, ctx: Context) -> None:
        """Add the rounded codes to the tensors and rows to `quantizer` and `plan`."""
        program.tables.setdefault(Quantizer.table, {})
        plan(program, ctx, self, Weights(self.bits, self.method), tib_weighted(program))
        found = {n: fillable(program, n, "weight", self.name) for n in tib_weighted(program)}
        specs = {n: spec for n, spec in found.items() if spec is not None}
        if ctx.rehearsal or not specs:
            for node, spec in specs.items():
                name = weight_of(node) or ""
                made = without_values(program.tensors[name], spec.grid, spec.group or None)
                set_weight_quantizer(program, node, name, made, f"tiar {spec.how}")
            return
        # By weight and spec: several nodes may read one weight, and some of them otherwise.
        key_of = {n.name: (weight_of(n) or "", replace(spec, by="", why="")) for n, spec in specs.items()}
        run = tib_run(program, ctx)
        with torch.no_grad():
            exact = run()
        nearest: dict[tuple[str, QuantSpec], QuantizedWeight] = {}
        for node in specs:
            name, spec = key_of[node.name]
            weight = program.tensors[name]
            if not bool(torch.isfinite(weight).all()):
                where = f"@{name} of {program.at(node)}"
                raise CalibrationError(f"Weight {where} holds NaN or infinity: the model is broken there.")
            nearest[name, spec] = quantize_weight(weight, spec.grid, spec.method, spec.group or None)
        rows = {node.name: quantizer_of(program, node) for node in tib_weighted(program)}
        requests = next(iter(exact.values())).shape[1]
        inputs = {n: input_fake_quantizer(program, r, requests) for n, r in rows.items() if r.input_bits}
        roundings = {
            key: SoftRounding(program.tensors[key[0]], q.scale, q.zero_point, q.grid, q.group)
            for key, q in nearest.items()
        }

        # Positions and truths have no gradient.
        learned = [n for n, value in exact.items() if value.is_floating_point() or value.is_complex()]

        def loss_of(features: dict[str, Tensor]) -> Tensor:
            return torch.stack([_real(features[n] - exact[n]).square().sum() for n in learned]).sum()

        with torch.no_grad():
            before = float(loss_of(run({n: nearest[w].dequantize() for n, w in key_of.items()}, inputs)))
        bar = ctx.progress.track(range(self.iterations), "reconstructing the TIB (TIAR)")
        after = reconstruct(
            list(roundings.values()),
            lambda: loss_of(run({n: roundings[w].soft for n, w in key_of.items()}, inputs)),
            iterations=self.iterations,
            lr=self.learning_rate,
            optimizer=self.optimizer,
            on_iteration=lambda _i, _loss: next(bar, None),
        )
        for _ in bar:
            pass
        better = after < before
        ctx.remark("reconstructed" if better else "not-reconstructed", nearest=before, reconstructed=after)
        for node, spec in specs.items():
            key = key_of[node.name]
            quantized = roundings[key].hard() if better else nearest[key]
            set_weight_quantizer(program, node, key[0], quantized, f"tiar {spec.how}")


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value
