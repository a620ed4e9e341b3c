"""The openvino backend: a lowered program as a model of OpenVINO with FakeQuantize, run by OpenVINO on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from tfqc.backends.openvino.emit import emit
from tfqc.backends.openvino.legalize import legalize
from tfqc.backends.openvino.runtime import OpenVinoModel
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.onnx.backend import EngineBackend, EngineOptions
from tfqc.codegen.support import Support
from tfqc.ir.match import is_call
from tfqc.ir.program import Program
from tfqc.passing import Pass

aten = torch.ops.aten
# OpenVINO 2026.4 reads ONNX's DFT, and what it computes then is something else, or of another shape.
_FOURIER = (
    aten.fft_fft.default, aten.fft_fft2.default, aten.fft_fftn.default,
    aten.fft_ifft.default, aten.fft_ifft2.default, aten.fft_ifftn.default,
    aten.fft_rfft.default, aten.fft_rfft2.default, aten.fft_rfftn.default,
    aten.fft_irfft.default, aten.fft_irfft2.default, aten.fft_irfftn.default,
    aten._fft_c2c.default, aten._fft_c2r.default, aten._fft_r2c.default,
)  # fmt: skip


class OpenVinoBackend(EngineBackend):
    """Writes a model of OpenVINO with FakeQuantize, and weights as integers; OpenVINO runs it."""

    name: ClassVar[str] = "openvino"
    files: ClassVar[frozenset[str]] = frozenset({"model.xml", "model.bin", "program.ir"})
    needs: ClassVar[tuple[str, ...]] = ("openvino", "onnxscript")

    def supports(self, program: Program, node: fx.Node, options: EngineOptions) -> Support:
        """As ONNX, but no Fourier transforms."""
        if is_call(node, *_FOURIER):
            return Support(False, "OpenVINO computes other Fourier transforms than torch: take onnx")
        return super().supports(program, node, options)

    def legalize(self, options: EngineOptions) -> tuple[Pass, ...]:
        """Nothing is left to do."""
        return legalize(options)

    def emit(self, program: Program, options: EngineOptions) -> Artifact:
        """`model.xml`, `model.bin` with its values, and the program's text."""
        return emit(program)

    def load(self, directory: Path) -> torch.nn.Module:
        """The model in OpenVINO, called like the one that was captured. It is data: nothing in it is code."""
        return OpenVinoModel(directory)
