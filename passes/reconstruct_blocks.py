"""reconstruct-blocks: BRECQ, rounding and steps of activations learned block by block against the model itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from tfqc.analysis.blocks import blocks_of, given_of
from tfqc.analysis.weighted import weight_of
from tfqc.calibration.batches import Batch, batches
from tfqc.calibration.block_training import BlockTraining, Found
from tfqc.calibration.results import Result
from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import model_key
from tfqc.calibration.values import Values
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import Quantizer, RowSource, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Pass
from tfqc.quant.adaround import Optimizer
from tfqc.quant.parameters import quantizer_of, set_input_quantizer, set_weight_quantizer


@dataclass(frozen=True)
class ReconstructBlocks(Pass):
    """Learn the rounding of weights and the steps of activations together, a block at a time (BRECQ with LSQ's steps).

    Starts from what passes before it have found; a block that training does not better keeps that. What a block reads
    comes from the quantized blocks before it, what it is to compute from the full-precision model; the temporal
    features that it reads are full-precision ones, and the temporal information block is left to passes of its own.
    Scales that have a row for each step are learned so. Options: iterations for each block; images, in all, at steps
    drawn from the trajectories; learning-rate of the rounding; steps-rate of the scales; optimizer (`stquant` keeps
    Adam's moments in few bits).
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
    optimizer: Optimizer = "adam"

    def __post_init__(self) -> None:
        for name in ("iterations", "images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1")
        for name in ("learning_rate", "steps_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)}: a positive number")

    def run(self, program: Program, ctx: Context) -> None:
        """Replace codes and scales of `quantizer` where learned ones are better."""
        for table in (Quantizer.table, RowSource.table):
            program.tables.setdefault(table, {})
        if ctx.rehearsal or not program.table(Quantizer):
            return
        blocks = blocks_of(program)
        calls = batches(program, ctx, self.images)
        identity = self._identity(program, calls)
        ticks = ctx.progress.track(range(len(blocks) * self.iterations), "reconstructing blocks")
        settled: set[str] = set()
        better, before, after = 0, 0.0, 0.0
        exact, behind = Values(), Values()
        self._begin(program, calls, exact, behind)
        for number, block in enumerate(blocks):
            training = BlockTraining(program, block, calls, behind, exact, settled)
            first = training.error()
            kept = Result(ctx.workdir, "block", f"{identity} {number} {block.module}", {})
            found = self._found(training, kept, ticks) if training.trains else None
            if found is not None:
                _set(program, found)
                better += 1
            training.take()  # where nothing was found, too: training has moved the scales
            settled |= training.scales
            training.go_on()
            before, after = before + first, after + training.error()
            wanted = {name for later in blocks[number + 1 :] for name in later.reads}
            exact.keep(wanted)
            behind.keep(wanted)
        for _ in ticks:
            pass
        if blocks:
            ctx.remark(
                "reconstructed-blocks", blocks=len(blocks), better=better, before=before / len(blocks),
                after=after / len(blocks),
            )  # fmt: skip

    def _begin(self, program: Program, calls: list[Batch], exact: Values, behind: Values) -> None:
        """What blocks are given: inputs and temporal features."""
        given = given_of(program)
        run = Simulation(program, given.graph)
        for number, call in enumerate(calls):
            with torch.no_grad():
                made = dict(zip(given.gives, run.call(call.inputs), strict=True))
            for values in (exact, behind):
                values.put(number, {**call.inputs, **made})

    def _found(self, training: BlockTraining, kept: Result, ticks: Iterator[int]) -> Found | None:
        """What training finds; no block is trained again that is in the working directory."""

        def ticked(_iteration: int, _loss: float) -> None:
            next(ticks, None)

        read = kept.read()
        if read is None:
            found = training.train(self.iterations, self.learning_rate, self.steps_rate, self.optimizer, ticked)
            read = {} if found is None else found.tensors()
            kept.write(read)
        else:
            for _ in range(self.iterations):
                next(ticks, None)
        return training.found(read) if read else None

    def _identity(self, program: Program, calls: list[Batch]) -> str:
        """Of what is learned: the model, its quantizers as they are now, what it is called with, and the options."""
        rows = program.table(Quantizer)
        tensors = [(name, program.tensors[name]) for name in {t for row in rows.values() for t in row.tensors()}]
        for number, call in enumerate(calls):
            tensors += [(f"{number}.{name}", value) for name, value in {**call.inputs, "": call.steps}.items()]
        return model_key(program, [self, sorted(rows.items())], tensors)


def _set(program: Program, found: Found) -> None:
    for name, weight in found.weights.items():
        node = program.node(name)
        how = f"brecq {quantizer_of(program, node).weight_how}".strip()
        set_weight_quantizer(program, node, weight_of(node) or "", weight, how)
    for node in program.step.nodes:
        row = quantizer_of(program, node)
        if row.input_scale in found.scales:
            scale, zero_point = found.scales[row.input_scale], program.tensors[row.input_zero_point]
            how = f"learned {row.input_how}"
            set_input_quantizer(program, node, row.input_bits, scale, zero_point, how, top=row.input_top)
