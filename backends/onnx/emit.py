"""From a lowered program to `model.onnx`, whose large tensors are those of `weights.safetensors`."""

from __future__ import annotations

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.onnx.writing import WEIGHTS, onnx_model
from tfqc.ir.program import Program
from tfqc.ir.render import render


def emit(program: Program) -> Artifact:
    """Files of a lowered program.

    Raises:
        TfqcError: torch.onnx does not write one of its operations.
    """
    data = onnx_model(program)
    return Artifact({"program.ir": render(program)}, {WEIGHTS: program.tensors}, binaries={"model.onnx": data})
