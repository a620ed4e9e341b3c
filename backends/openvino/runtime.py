"""A saved model of OpenVINO, run by it on the CPU and called like the model that was captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tfqc.codegen.onnx.extra import needed
from tfqc.codegen.onnx.session import SessionModel, not_taken


class OpenVinoModel(SessionModel):
    """A compiled model of OpenVINO. What is not quantized is computed in f32.

    Raises:
        ArtifactError: OpenVINO does not take the model.
    """

    engine = "OpenVINO"

    def __init__(self, directory: Path) -> None:
        openvino, file = needed("openvino", "openvino"), directory / "model.xml"
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            # Its own default quantizes inputs of products whose weights alone are quantized, to 8 bits as they come.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        try:
            compiled = openvino.compile_model(openvino.Core().read_model(str(file)), "CPU", settings)
        except Exception as error:
            raise not_taken(self.engine, file, error) from error
        super().__init__(directory, [value.any_name for value in compiled.inputs])
        self._compiled = compiled

    def infer(self, given: Mapping[str, Any]) -> list[Any]:
        """Run the model; what it returns is the caller's."""
        found = self._compiled(given, share_outputs=False)
        return [found[value] for value in self._compiled.outputs]
