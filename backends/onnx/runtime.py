"""A saved ONNX model, run by onnxruntime and called like the model that was captured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tfqc.codegen.onnx.extra import needed
from tfqc.codegen.onnx.session import SessionModel, not_taken


class OnnxModel(SessionModel):
    """A session of onnxruntime.

    Raises:
        ArtifactError: onnxruntime does not take the model.
    """

    engine = "onnxruntime"

    def __init__(self, directory: Path) -> None:
        onnxruntime, file = needed("onnxruntime"), directory / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Its own default quantizes inputs of products whose weights alone are quantized, to 8 bits as they come.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise not_taken(self.engine, file, error) from error
        super().__init__(directory, [i.name for i in session.get_inputs()])
        self._session = session

    def infer(self, given: Mapping[str, Any]) -> list[Any]:
        """Run the session."""
        return self._session.run(None, given)
