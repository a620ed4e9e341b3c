"""plan-quantization: which weights and inputs are quantized, and to what, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tfqc.analysis.weighted import weighted_nodes
from tfqc.ir.program import Program, Stage
from tfqc.ir.rows import QuantPlan, Tib
from tfqc.ir.tables import Fact
from tfqc.passing import Context, Contract, Pass
from tfqc.quant.planning import Inputs, Weights, plan
from tfqc.quant.step_policy import StepPolicy


@dataclass(frozen=True)
class PlanQuantization(Pass):
    """Plan the weight and the input of every linear and convolution in scope that nothing is planned for yet.

    Options: weights, activations (bits, none = left in floating point); method, symmetric, and group (columns that
    share a scale, none = per channel) of weights; group-scope (`linear`: weights of larger windows have no groups);
    mode, activation-method (`fsc`: finite-set calibration, `tdq`: learned by learn-time-scales) and intervals (per
    step: rows that the schedule shares, 0 = one for each step) of activations; edges (bits of the model's first and
    last layer, where that is more; none = as the others); scope (`tib`: only inside the temporal information block;
    `linear`: only linears and convolutions of 1 x 1); skip (modules left in floating point, as
    `tfqc.analysis.skipping` reads them); first-steps, last-steps (protected: activations stay in floating point
    there), overlap (of steps that are both) and reasoner (`a16`: what runs once for each image is protected, too),
    as `tfqc.quant.step_policy` has them. Of two such passes the first has its way; the last plans the rest.
    """

    name: ClassVar[str] = "plan-quantization"
    needs: ClassVar[Stage] = Stage.NORMALIZED
    below: ClassVar[Stage | None] = Stage.FOLDED
    provides: ClassVar[frozenset[Fact]] = frozenset({QuantPlan})

    weights: int | None = 8
    activations: int | None = 8
    mode: Literal["static", "per-step", "per-token"] = "static"
    method: Literal["min-max", "mse"] = "min-max"
    activation_method: Literal["min-max", "mse", "fsc", "tdq"] = "min-max"
    symmetric: bool = True
    group: int | None = None
    group_scope: Literal["all", "linear"] = "all"
    intervals: int = 0
    edges: int | None = None
    scope: Literal["all", "tib", "linear"] = "all"
    skip: tuple[str, ...] = ()
    first_steps: int = 0
    last_steps: int = 0
    overlap: Literal["a16", "native"] = "a16"
    reasoner: Literal["a16", "native"] = "native"

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weights), ("activations", self.activations), ("edges", self.edges)):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{what}={bits} is out of range: 2 to 8 bits")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group}: at least one column")
        if self.intervals < 0:
            raise ValueError(f"intervals={self.intervals} is negative")
        if self.activation_method in ("fsc", "tdq") and self.mode != "per-step":
            raise ValueError(f"activation-method={self.activation_method} has a scale for each step: say mode=per-step")
        self._policy()

    def contract(self) -> Contract:
        """The block has to be known where it alone is planned, and the schedule where its steps are protected."""
        protects = bool(self.first_steps or self.last_steps)
        return replace(
            super().contract(),
            requires=frozenset({Tib} if self.scope == "tib" else ()),
            data=frozenset({"schedule"} if protects else ()),
        )

    def run(self, program: Program, ctx: Context) -> None:
        """Add rows to `plan`."""
        weights = Weights(
            self.weights, self.method, self.group, self.group_scope, self.symmetric, self._edges(self.weights)
        )
        inputs = Inputs(
            self.activations,
            self.activation_method,
            self.mode,
            self.intervals,
            self._edges(self.activations),
            self._policy(),
        )
        nodes = list(weighted_nodes(program))
        for options in (weights, inputs):
            plan(program, ctx, self, options, nodes, scope=self.scope, skip=self.skip)

    def _policy(self) -> StepPolicy:
        return StepPolicy(self.first_steps, self.last_steps, self.overlap, self.reasoner)

    def _edges(self, bits: int | None) -> int | None:
        return self.edges if self.edges is not None and bits is not None and self.edges > bits else None
