"""The fake-quant backend: claims every ATen and tfqc operation, emits Python that needs torch and safetensors alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from tfqc.backends.fake_quant.emit import emit
from tfqc.backends.fake_quant.legalize import legalize
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.backend import Backend
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.passing import Pass


@dataclass(frozen=True)
class FakeQuantOptions:
    """Options of the target.

    weights, activations: bits, 2 to 8, or none for floating point. mode: of the activations. group: columns of a weight
    that share a scale, none = per output channel. edges: bits of the first and last layer, where that is more; none =
    as the others. policy: for timesteps that are not in the schedule.
    """

    weights: int | None = 8
    activations: int | None = 8
    mode: Literal["static", "per-step", "per-token"] = "per-step"
    group: int | None = None
    edges: int | None = 8
    policy: Literal["recompute", "nearest", "error"] = "recompute"

    def __post_init__(self) -> None:
        for what, bits in (("weights", self.weights), ("activations", self.activations), ("edges", self.edges)):
            if bits is not None and not 2 <= bits <= 8:
                raise ValueError(f"{what}={bits} is out of range: 2 to 8 bits, or none for floating point")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} is out of range: at least 1 column, or none")


class FakeQuantBackend(Backend):
    """Quantizes onto exact integer grids and computes in fp32."""

    name: ClassVar[str] = "fake-quant"
    options: ClassVar[type[Any]] = FakeQuantOptions
    files: ClassVar[frozenset[str]] = frozenset({"model.py", "program.ir", "weights.safetensors"})
    simulates: ClassVar[bool] = True
    adapts: ClassVar[bool] = True

    def supports(self, program: Program, node: fx.Node, options: FakeQuantOptions) -> Support:
        """Every operation that has a name in the IR runs."""
        name = op_name(node.target)
        if name.startswith(("aten.", "tfqc.", "operator.", "math.", "torch.")):
            return YES
        return Support(False, f"{name} is neither an ATen nor a tfqc operation")

    def pipeline(self, options: FakeQuantOptions, strategy: str) -> str:
        """The recipe of a strategy at the target's bits."""
        return quantization_pipeline(
            strategy,
            weights=options.weights,
            activations=options.activations,
            mode=options.mode,
            group=options.group,
            edges=options.edges,
            policy=options.policy,
        )

    def legalize(self, options: FakeQuantOptions) -> tuple[Pass, ...]:
        """Nothing is left to do: torch runs the operations as they are."""
        return legalize(options)

    def emit(self, program: Program, options: FakeQuantOptions) -> Artifact:
        """`model.py`, the program's text, and its tensors; those of @time apart."""
        return emit(program)
