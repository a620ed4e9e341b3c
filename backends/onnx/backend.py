"""The onnx backend: a lowered program as an ONNX model of QuantizeLinear and DequantizeLinear, run by onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from tfqc.backends.onnx.emit import emit
from tfqc.backends.onnx.legalize import legalize
from tfqc.backends.onnx.runtime import OnnxModel
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.onnx.backend import EngineBackend, EngineOptions
from tfqc.ir.program import Program
from tfqc.passing import Pass


class OnnxBackend(EngineBackend):
    """Writes an ONNX model with QuantizeLinear and DequantizeLinear, opset 21; onnxruntime runs it."""

    name: ClassVar[str] = "onnx"
    files: ClassVar[frozenset[str]] = frozenset({"model.onnx", "program.ir", "weights.safetensors"})

    def legalize(self, options: EngineOptions) -> tuple[Pass, ...]:
        """Nothing is left to do."""
        return legalize(options)

    def emit(self, program: Program, options: EngineOptions) -> Artifact:
        """`model.onnx`, the program's text, and its tensors, which the model reads from `weights.safetensors`."""
        return emit(program)

    def load(self, directory: Path) -> torch.nn.Module:
        """The model in onnxruntime, called like the one that was captured. It is data: nothing in it is code."""
        return OnnxModel(directory)
