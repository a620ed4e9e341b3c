"""Running a function with some of its linears and convolutions quantized, or watched, without rewriting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from tfqc.analysis.weighted import WEIGHTED, is_weighted
from tfqc.ir.program import STEP, Program


class Simulation(fx.Interpreter):
    """Interprets a graph; for a weighted node, by name: `inputs` maps its input (fake quantization), `weights` replaces
    its weight (a value, or a function that computes one, so that gradients reach it), and `observe` sees its input.
    `values` replaces what any node computes.
    """

    def __init__(
        self,
        program: Program,
        graph: fx.Graph,
        *,
        weights: Mapping[str, Tensor | Callable[[], Tensor]] | None = None,
        inputs: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        observe: Callable[[str, Tensor], None] | None = None,
        values: Mapping[str, Tensor] | None = None,
    ) -> None:
        alone = Program({STEP: graph}, program.tensors, program.inputs)
        super().__init__(alone.module(), garbage_collect_values=True)
        self.weights, self.inputs, self.observe = weights or {}, inputs or {}, observe
        self.values = values or {}
        self.parameters = [n.name for n in graph.nodes if n.op == "placeholder"]

    def run_node(self, n: fx.Node) -> Any:
        """One node; the weighted ones with their replacements."""
        if n.name in self.values:
            return self.values[n.name]
        if not is_weighted(n):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        names, operands = WEIGHTED[n.target], dict(kwargs)
        if self.observe is not None:
            self.observe(n.name, operands[names.input])
        if n.name in self.inputs:
            operands[names.input] = self.inputs[n.name](operands[names.input])
        if n.name in self.weights:
            weight = self.weights[n.name]
            operands[names.weight] = weight if isinstance(weight, Tensor) else weight()
        return n.target(*args, **operands)  # type: ignore[operator]

    def call(self, values: Mapping[str, Tensor]) -> Any:
        """Run with parameters by name."""
        return self.run(*(values[name] for name in self.parameters))
