"""A block of a network on its own: how far its quantized form is from the full-precision one, and training for less."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tfqc.analysis.blocks import Block
from tfqc.analysis.weighted import weight_of, weighted_nodes
from tfqc.calibration.batches import Batch
from tfqc.calibration.simulate import Simulation
from tfqc.calibration.values import Values
from tfqc.ir.program import Program
from tfqc.quant.adaround import Optimizer, SoftRounding, reconstruct
from tfqc.quant.grid import QuantizedWeight
from tfqc.quant.learned_steps import LearnedSteps
from tfqc.quant.parameters import input_grid, quantized_weight, quantizer_of, stored_weight
from tfqc.quant.plan import planned

REGULAR = 1.0  # a block whose weights are all half way between two codes is as bad as one whose output is its mean
Weights = Mapping[str, Tensor | Callable[[], Tensor]]


@dataclass(frozen=True)
class Found:
    """What training found: weights by the node's name, scales by the name of the tensor that has them now."""

    weights: Mapping[str, QuantizedWeight]
    scales: Mapping[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Codes and scales by name, as `BlockTraining.found` reads them."""
        codes = {f"codes.{name}": weight.q for name, weight in self.weights.items()}
        return {**codes, **{f"scale.{name}": scale for name, scale in self.scales.items()}}


class BlockTraining:
    """A block, what it reads behind quantized blocks, and what it is to compute.

    Args:
        batches: what the model was called with.
        behind: values behind quantized blocks, by batch.
        exact: those of the full-precision model; what the block gives is put there.
        settled: tensors of scales that stay as they are: a block before has read them.
    """

    def __init__(
        self, program: Program, block: Block, batches: Sequence[Batch], behind: Values, exact: Values,
        settled: set[str],
    ) -> None:  # fmt: skip
        self._program, self._block, self._batches = program, block, batches
        self._behind, self._exact = behind, exact
        self._run = Simulation(program, block.graph)
        with torch.no_grad():
            for number in range(len(batches)):
                exact.put(number, self._computed(number, exact, {}, {}))
        self.take()
        self._settled = settled
        shared = _read_twice(program)
        self._learnable = [n for n in self._weights if weight_of(program.node(n)) not in shared]
        self._scale = {name: power for name in block.gives if (power := self._power(name)) > 0}

    def take(self) -> None:
        """Quantize as the program's quantizers say now."""
        program = self._program
        rows = {name: quantizer_of(program, program.node(name)) for name in self._block.layers}
        self._weights: dict[str, Tensor] = {n: stored_weight(program, r) for n, r in rows.items() if r.codes}
        self._steps: dict[str, LearnedSteps] = {}
        self._inputs: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        for name, row in rows.items():
            if row.input_bits and not row.input_scale:
                self._inputs[name] = lambda x, _steps, bits=row.input_bits: (
                    x + (torch.ops.tfqc.quantize_dynamic(x.detach(), bits) - x).detach()
                )
            elif row.input_bits:
                if row.input_scale not in self._steps:
                    scale, zero_point = program.tensors[row.input_scale], program.tensors[row.input_zero_point]
                    protected = program.tensors[row.input_protected] if row.input_protected else None
                    self._steps[row.input_scale] = LearnedSteps(scale, zero_point, input_grid(row), protected)
                self._inputs[name] = self._steps[row.input_scale]

    @property
    def scales(self) -> set[str]:
        """Tensors of scales that the block reads."""
        return set(self._steps)

    @property
    def trains(self) -> bool:
        """Whether there is something to learn, and something to learn it for."""
        return bool(self._scale) and bool(self._learnable or self._steps.keys() - self._settled)

    def error(self, weights: Weights | None = None) -> float:
        """What is lost, over all batches: ‖ŷ - y‖² / ‖y - mean(y)‖², of several outputs the mean; 0 without numbers."""
        if not self._scale:
            return 0.0
        with torch.no_grad():
            lost = [float(self._loss(i, weights or self._weights)) for i in range(len(self._batches))]
        return math.fsum(lost) / len(lost)

    def train(
        self, iterations: int, rate: float, steps_rate: float, optimizer: Optimizer,
        on_iteration: Callable[[int, float], None],
    ) -> Found | None:  # fmt: skip
        """Learn rounding and scales, a batch an iteration; None where the error is not less than before."""
        before = self.error()
        roundings = {name: SoftRounding.of(_float(self._program, name), q) for name, q in self._stored().items()}
        steps = {name: each for name, each in self._steps.items() if name not in self._settled}
        random = torch.Generator().manual_seed(0)
        order = iter(torch.randint(len(self._batches), (iterations + 1,), generator=random).tolist())
        soft: Weights = {**self._weights, **{name: rounding.soft for name, rounding in roundings.items()}}
        width = sum(rounding.alpha.numel() for rounding in roundings.values())
        reconstruct(
            list(roundings.values()), lambda: self._loss(next(order), soft), iterations=iterations, lr=rate,
            weight=REGULAR / max(width, 1), optimizer=optimizer, steps=[each.theta for each in steps.values()],
            steps_lr=steps_rate, on_iteration=on_iteration,
        )  # fmt: skip
        hard = {name: rounding.hard() for name, rounding in roundings.items()}
        if self.error({**self._weights, **{name: q.dequantize() for name, q in hard.items()}}) < before:
            return Found(hard, {name: each.learned().detach() for name, each in steps.items()})
        return None

    def found(self, tensors: Mapping[str, Tensor]) -> Found:
        """What `Found.tensors` gave."""
        stored, own = self._stored(), {name: each.scale for name, each in self._steps.items()}
        weights = {n: replace(q, q=tensors[f"codes.{n}"]) for n, q in stored.items() if f"codes.{n}" in tensors}
        return Found(weights, {n: tensors[f"scale.{n}"] for n in own if f"scale.{n}" in tensors})

    def _stored(self) -> dict[str, QuantizedWeight]:
        """Weights whose rounding is learned, as they are now."""
        program, nodes = self._program, [self._program.node(name) for name in self._learnable]
        symmetric = {node: planned(program, node, "weight")[0].symmetric for node in nodes}
        return {n.name: quantized_weight(program, quantizer_of(program, n), symmetric[n]) for n in nodes}

    def go_on(self) -> None:
        """Put what the block gives, quantized, behind it."""
        with torch.no_grad():
            for number in range(len(self._batches)):
                self._behind.put(number, self._quantized(number, self._weights))

    def _loss(self, number: int, weights: Weights) -> Tensor:
        made, wanted = self._quantized(number, weights), self._exact.read(number, self._scale)
        return torch.stack([(made[n] - wanted[n]).square().mean() / s for n, s in self._scale.items()]).mean()

    def _quantized(self, number: int, weights: Weights) -> dict[str, Any]:
        steps = self._batches[number].steps
        inputs = {name: lambda x, f=each: f(x, steps) for name, each in self._inputs.items()}
        return self._computed(number, self._behind, weights, inputs)

    def _computed(
        self, number: int, of: Values, weights: Weights, inputs: Mapping[str, Callable[[Tensor], Tensor]]
    ) -> dict[str, Any]:
        self._run.weights, self._run.inputs = weights, inputs
        values = self._run.call(of.read(number, self._block.reads))
        return dict(zip(self._block.gives, values, strict=True))

    def _power(self, name: str) -> float:
        """The variance of an output; 0 for what is no tensor of numbers."""
        values = [self._exact.read(number, [name])[name] for number in range(len(self._batches))]
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
            return 0.0
        mean = math.fsum(float(value.double().mean()) for value in values) / len(values)
        return math.fsum(float((value.double() - mean).square().mean()) for value in values) / len(values)


def _float(program: Program, name: str) -> Tensor:
    return program.tensors[weight_of(program.node(name)) or ""]


def _read_twice(program: Program) -> set[str]:
    """Weights that several nodes read: what suits one of them need not suit the others."""
    names = [weight_of(node) or "" for node in weighted_nodes(program)]
    return {name for name in names if names.count(name) > 1}
