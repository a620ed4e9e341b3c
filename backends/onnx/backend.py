"""The onnx backend: a lowered program as an ONNX model of QuantizeLinear and DequantizeLinear, run by onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from tfqc.backends.onnx.emit import emit
from tfqc.backends.onnx.extra import needed
from tfqc.backends.onnx.legalize import legalize
from tfqc.backends.onnx.runtime import OnnxModel
from tfqc.backends.onnx.support import why_not
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.backend import Backend
from tfqc.codegen.recipes import quantization_pipeline
from tfqc.codegen.support import YES, Support
from tfqc.ir.program import Program
from tfqc.passing import Pass
from tfqc.passing.remarks import Remark


@dataclass(frozen=True)
class OnnxOptions:
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


class OnnxBackend(Backend):
    """Writes an ONNX model with QuantizeLinear and DequantizeLinear, opset 21; onnxruntime runs it."""

    name: ClassVar[str] = "onnx"
    options: ClassVar[type[Any]] = OnnxOptions
    files: ClassVar[frozenset[str]] = frozenset({"model.onnx", "program.ir", "weights.safetensors"})

    def remarks(self, options: OnnxOptions) -> list[Remark]:
        """None; what is not installed is said before anything is made."""
        needed("onnxscript")
        return []

    def supports(self, program: Program, node: fx.Node, options: OnnxOptions) -> Support:
        """All that torch.onnx writes, and quantization as ONNX has it."""
        reason = why_not(program, node)
        return Support(False, reason) if reason else YES

    def pipeline(self, options: OnnxOptions, strategy: str) -> str:
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

    def legalize(self, options: OnnxOptions) -> tuple[Pass, ...]:
        """Nothing is left to do."""
        return legalize(options)

    def emit(self, program: Program, options: OnnxOptions) -> Artifact:
        """`model.onnx`, the program's text, and its tensors, which the model reads from `weights.safetensors`."""
        return emit(program)

    def load(self, directory: Path) -> torch.nn.Module:
        """The model in onnxruntime, called like the one that was captured. It is data: nothing in it is code."""
        return OnnxModel(directory)
