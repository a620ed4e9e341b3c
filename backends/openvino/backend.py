"""The openvino backend: a lowered program as a model of OpenVINO with FakeQuantize, run by OpenVINO on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch

from tfqc.backends.openvino.emit import emit
from tfqc.backends.openvino.legalize import legalize
from tfqc.backends.openvino.runtime import OpenVinoModel
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.onnx.backend import EngineBackend, EngineOptions
from tfqc.ir.program import Program
from tfqc.passing import Pass


class OpenVinoBackend(EngineBackend):
    """Writes a model of OpenVINO with FakeQuantize, and weights as integers; OpenVINO runs it."""

    name: ClassVar[str] = "openvino"
    files: ClassVar[frozenset[str]] = frozenset({"model.xml", "model.bin", "program.ir"})
    needs: ClassVar[tuple[str, ...]] = ("openvino", "onnxscript")

    def legalize(self, options: EngineOptions) -> tuple[Pass, ...]:
        """Nothing is left to do."""
        return legalize(options)

    def emit(self, program: Program, options: EngineOptions) -> Artifact:
        """`model.xml`, `model.bin` with its values, and the program's text."""
        return emit(program)

    def load(self, directory: Path) -> torch.nn.Module:
        """The model in OpenVINO, called like the one that was captured. It is data: nothing in it is code."""
        return OpenVinoModel(directory)
