"""The cuda-int4 backend: products with 4-bit weights as CUDA kernels, everything else as torch in f16."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from tfqc.analysis.tensor_cores import why_not_tensor_cores
from tfqc.analysis.weighted import WEIGHTED
from tfqc.artifact import Artifact
from tfqc.backend import YES, Backend, Support
from tfqc.backends.cuda_int4.emit import emit
from tfqc.backends.cuda_int4.legalize import legalize
from tfqc.emission.importing import load_model
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program
from tfqc.passing import Pass
from tfqc.recipes import quantization_pipeline


@dataclass(frozen=True)
class CudaInt4Options:
    """Options of the target.

    arch: the chip whose instructions multiply; fat = one text for all of them. mode: bits of weights and activations.
    activations: their ranges, fixed, a row for each step, or of each token at run time. edges: bits of the first and
    last layer, which torch runs where that is more than the mode's. policy: for timesteps that are not in the schedule.
    """

    arch: Literal["sm_80", "sm_86", "sm_89", "sm_90a", "sm_120a", "fat"] = "fat"
    mode: Literal["w4a4", "w4a8"] = "w4a4"
    activations: Literal["static", "per-step", "per-token"] = "per-step"
    edges: int | None = 8
    policy: Literal["recompute", "nearest", "error"] = "recompute"


class CudaInt4Backend(Backend):
    """Runs quantized models in 4-bit integers on the tensor cores of NVIDIA GPUs."""

    name: ClassVar[str] = "cuda-int4"
    options: ClassVar[type[Any]] = CudaInt4Options

    def supports(self, program: Program, node: fx.Node, options: CudaInt4Options) -> Support:
        """Everything runs; linears and convolutions that torch runs say why."""
        if node.graph is not program.step or op_name(node.target) not in WEIGHTED:
            return YES
        return Support(True, f"runs in torch: {why_not_tensor_cores(program, node)}")

    def pipeline(self, options: CudaInt4Options, strategy: str) -> str:
        """The recipe of a strategy at the mode's bits."""
        return quantization_pipeline(
            strategy,
            weights=4,
            activations=4 if options.mode == "w4a4" else 8,
            mode=options.activations,
            edges=options.edges,
            policy=options.policy,
        )

    def legalize(self, options: CudaInt4Options) -> tuple[Pass, ...]:
        """Products, fusions, f16."""
        return legalize()

    def emit(self, program: Program, options: CudaInt4Options) -> Artifact:
        """`model.py` with the lines of a step, `kernels.cu`, the program's text, and its tensors."""
        return emit(program, options.arch)

    def load(self, directory: Path) -> torch.nn.Module:
        """The model of `model.py`, on the CPU; `to("cuda")` brings it to a device."""
        return load_model(directory)
