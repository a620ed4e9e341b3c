"""The cpu-int8 backend: integer products and what lies between them as C++ kernels, everything else as torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from tfqc.backends.cpu_int8.emit import emit
from tfqc.backends.cpu_int8.legalize import legalize
from tfqc.backends.cpu_int8.support import support_of
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.backend import Backend
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.passing import Pass


@dataclass(frozen=True)
class CpuInt8Options:
    """Options of the target.

    isa: instructions of the kernels; auto = the best that the CPU has when the artifact is loaded. residual: how
    floating point values are stored between kernels. attention: what its products are computed in. activations: their
    ranges, fixed, a row for each step, or of each token at run time. weights: bits that are stored, 8 or 4; products
    are 8-bit ones. policy: for timesteps that are not in the schedule.
    """

    isa: Literal["auto", "amx", "avx512_vnni", "avx2"] = "auto"
    residual: Literal["bf16", "fp32"] = "bf16"
    attention: Literal["int8", "bf16", "fp32"] = "int8"
    activations: Literal["static", "per-step", "per-token"] = "per-step"
    weights: int = 8
    policy: Literal["recompute", "nearest", "error"] = "recompute"

    def __post_init__(self) -> None:
        if self.weights not in (4, 8):
            raise ValueError(f"weights={self.weights} is out of range: 4 or 8 bits are stored")


class CpuInt8Backend(Backend):
    """Runs quantized models in 8-bit integers on x86 CPUs."""

    name: ClassVar[str] = "cpu-int8"
    options: ClassVar[type[Any]] = CpuInt8Options
    files: ClassVar[frozenset[str]] = frozenset({"model.py", "kernels.cpp", "program.ir", "weights.safetensors"})
    adapts: ClassVar[bool] = True

    def supports(self, program: Program, node: fx.Node, options: CpuInt8Options) -> Support:
        """Everything runs; what runs in torch says why."""
        return support_of(program, node) if node.graph is program.step else YES

    def pipeline(self, options: CpuInt8Options, strategy: str) -> str:
        """The recipe of a strategy with 8-bit activations."""
        return quantization_pipeline(
            strategy,
            weights=options.weights,
            activations=8,
            mode=options.activations,
            policy=options.policy,
            reconstruct=options.weights < 8,
        )

    def legalize(self, options: CpuInt8Options) -> tuple[Pass, ...]:
        """Integer products, fusions, memory."""
        return legalize(options)

    def emit(self, program: Program, options: CpuInt8Options) -> Artifact:
        """`model.py` with the lines of a step, `kernels.cpp`, the program's text, and its tensors."""
        return emit(program, options.isa)
