"""reconstruct-blocks: BRECQ, rounding and activation steps learned block by block against the full-precision model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tfqc.analysis.blocks import Block, blocks_of, given_of
from tfqc.analysis.weighted import weight_of
from tfqc.calibration.samples import Sample, samples
from tfqc.calibration.simulate import Simulation
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, QuantPlan, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Pass
from tfqc.passing.remarks import remark_kind
from tfqc.quant.adaround import Optimizer, SoftRounding, reconstruct
from tfqc.quant.grid import Grid, QuantizedWeight
from tfqc.quant.learned_steps import LearnedSteps
from tfqc.quant.plan import planned
from tfqc.quant.parameters import (
    quantized_weight, quantizer_of, set_input_quantizer, set_weight_quantizer, stored_weight,
)  # fmt: skip


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """BRECQ with learned steps: a block's error behind quantized blocks is minimised over its rounding and its scales.

    Starts from what passes before it have found, and keeps that for a block that it cannot better. What a block reads
    comes from the quantized blocks before it, what it is to compute from the full-precision model; temporal features
    are full-precision ones. Options: iterations for each block; images that are drawn from all steps of the
    trajectories; learning-rate of the rounding, steps-rate of the scales; optimizer (`stquant` keeps Adam's moments in
    few bits).
    """

    name: ClassVar[str] = "reconstruct-blocks"
    needs: ClassVar[Stage] = Stage.CALIBRATED
    below: ClassVar[Stage | None] = Stage.FOLDED
    requires: ClassVar[frozenset[Fact]] = frozenset({Tib, Quantizer})
    provides: ClassVar[frozenset[Fact]] = frozenset({Quantizer, RowSource})
    data: ClassVar[frozenset[str]] = frozenset({"sampler", "calibration", "weights"})

    iterations: int = 500
    images: int = 512
    learning_rate: float = 0.01
    steps_rate: float = 0.002
    regular: float = 0.001
    optimizer: Optimizer = "adam"

    def run(self, program: Program, ctx: Context) -> None:
        if ctx.rehearsal:
            return
        blocks = blocks_of(program)
        given = Simulation(program, given_of(program).graph)
        calls = samples(program, ctx, self.images)
        with torch.no_grad():
            exact: list[dict[str, Any]] = [
                {**call.inputs, **dict(zip(given_of(program).gives, given.call(call.inputs), strict=True))} for call in calls
            ]
        quantized: list[dict[str, Any]] = [dict(values) for values in exact]
        bar = ctx.progress.track(blocks, "reconstructing blocks", len(blocks))
        for block in bar:
            its = _Training(program, block, calls, quantized, exact)
            before, after = its.better(self)
            print(block.module, f"{before:.5f} -> {after:.5f}", flush=True)
            its.go_on()


class _Training:
    """A block with what it reads, quantized, and what it is to compute."""

    def __init__(
        self, program: Program, block: Block, calls: Sequence[Sample], quantized: list[dict[str, Any]],
        exact: list[dict[str, Any]],
    ) -> None:
        self.program, self.block, self.calls = program, block, calls
        self.run = Simulation(program, block.graph)
        self.quantized, self.exact = quantized, exact
        with torch.no_grad():
            for values in exact:
                values.update(zip(block.gives, self.run.call(values), strict=True))
        rows = {n: quantizer_of(program, program.node(n)) for n in block.layers}
        self.weights: dict[str, Any] = {n: stored_weight(program, r) for n, r in rows.items() if r.codes}
        self.steps: dict[str, LearnedSteps] = {}
        self.inputs: dict[str, Any] = {}
        for name, row in rows.items():
            if row.input_bits and row.input_scale:
                if row.input_scale not in self.steps:
                    scale, zero = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
                    protected = program.tensors[row.input_protected] if row.input_protected else None
                    self.steps[row.input_scale] = LearnedSteps(scale, zero, Grid(row.input_bits, False), protected)
                self.inputs[name] = self.steps[row.input_scale]
            elif row.input_bits:
                self.inputs[name] = lambda x, steps, bits=row.input_bits: (
                    x + (torch.ops.tfqc.quantize_dynamic(x, bits) - x).detach()
                )
        self.tensors = [g for g in block.gives if isinstance(exact[0][g], Tensor) and exact[0][g].is_floating_point()]
        self.power = {g: torch.cat([v[g].flatten() for v in exact]).var().item() for g in self.tensors}

    def forward(self, number: int, weights: Mapping[str, Any]) -> dict[str, Any]:
        steps = self.calls[number].steps
        self.run.weights = weights
        self.run.inputs = {n: lambda x, f=f: f(x, steps) for n, f in self.inputs.items()}
        return dict(zip(self.block.gives, self.run.call(self.quantized[number]), strict=True))

    def loss(self, number: int, weights: Mapping[str, Any]) -> Tensor:
        made, wanted = self.forward(number, weights), self.exact[number]
        return torch.stack(
            [(made[g] - wanted[g]).square().mean() / self.power[g] * wanted[g].shape[1] for g in self.tensors]
        ).mean()

    def error(self, weights: Mapping[str, Any]) -> float:
        with torch.no_grad():
            return math.fsum(float(self.loss(i, weights)) for i in range(len(self.calls))) / len(self.calls)

    def better(self, its: ReconstructBlocks) -> tuple[float, float]:
        program = self.program
        before = self.error(self.weights)
        found: dict[str, QuantizedWeight] = {
            n: quantized_weight(program, r, planned(program, program.node(n), "weight")[0].symmetric)
            for n in self.weights
            if (r := quantizer_of(program, program.node(n)))
        }
        roundings = {
            n: SoftRounding(program.tensors[weight_of(program.node(n)) or ""], q.scale, q.zero_point, q.grid, q.group)
            for n, q in found.items()
        }
        soft = {n: r.soft for n, r in roundings.items()}
        random = torch.Generator().manual_seed(0)
        order = torch.randint(len(self.calls), (self.iterations_of(its) + 1,), generator=random).tolist()
        numbers = iter(order)
        reconstruct(
            list(roundings.values()), lambda: self.loss(next(numbers), soft), iterations=its.iterations,
            lr=its.learning_rate, weight=its.regular, optimizer=its.optimizer,
            steps=[s.theta for s in self.steps.values()], steps_lr=its.steps_rate,
        )  # fmt: skip
        hard = {n: r.hard() for n, r in roundings.items()}
        learned: dict[str, Any] = {n: q.dequantize() for n, q in hard.items()}
        after = self.error(learned)
        if after >= before:
            with torch.no_grad():
                for steps in self.steps.values():
                    steps.theta.zero_()
            return before, after
        self.weights = learned
        rows = {n: quantizer_of(program, program.node(n)) for n in self.block.layers}
        with torch.no_grad():
            for name, q in hard.items():
                node = program.node(name)
                set_weight_quantizer(program, node, weight_of(node) or "", q, "brecq")
            for node in program.step.nodes:
                row = program.table(Quantizer).get(node.name)
                if row is not None and row.input_scale in self.steps:
                    steps = self.steps[row.input_scale]
                    set_input_quantizer(program, node, row.input_bits, steps.learned(), steps.zero_point, "lsq")
        return before, after

    def iterations_of(self, its: ReconstructBlocks) -> int:
        return its.iterations

    def go_on(self) -> None:
        with torch.no_grad():
            for number, values in enumerate(self.quantized):
                values.update(self.forward(number, self.weights))
