"""What backends share whose engines read ONNX: options, the pipeline, which operations are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from tfqc.codegen.backend import Backend
from tfqc.codegen.onnx.extra import needed
from tfqc.codegen.onnx.support import why_not
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.passing.remarks import Remark


@dataclass(frozen=True)
class EngineOptions:
    """Options of the target.

    weights: bits, 2 to 8, or none for floating point. activations: 8, or none. mode: one range for each step of the
    schedule, or one for all, which is what engines fuse into products of integers. group: columns of a weight that
    share a scale, none = per output channel. reconstruct: search for good codes of the weights (GPTQ), or round.
    """

    weights: int | None = 8
    activations: Literal[8] | None = 8
    mode: Literal["static", "per-step"] = "per-step"
    group: int | None = None
    reconstruct: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and not 2 <= self.weights <= 8:
            raise ValueError(f"weights={self.weights} is out of range: 2 to 8 bits, or none for floating point")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} is out of range: at least 1 column, or none")


class EngineBackend(Backend):
    """A backend whose engine reads what torch.onnx writes."""

    options: ClassVar[type[Any]] = EngineOptions
    needs: ClassVar[tuple[str, ...]] = ("onnxscript",)

    def remarks(self, options: EngineOptions) -> list[Remark]:
        """None; what is not installed is said before anything is made."""
        for name in self.needs:
            needed(name, self.name)
        return []

    def supports(self, program: Program, node: fx.Node, options: EngineOptions) -> Support:
        """All that torch.onnx writes, and quantization as ONNX has it."""
        reason = why_not(program, node, self.name)
        return Support(False, reason) if reason else YES

    def pipeline(self, options: EngineOptions, strategy: str) -> str:
        """The recipe of a strategy; a timestep that is not in the schedule is computed as the nearest one."""
        return quantization_pipeline(
            strategy,
            weights=options.weights,
            activations=options.activations,
            mode=options.mode,
            group=options.group,
            policy="nearest",
            reconstruct=options.reconstruct,
        )
