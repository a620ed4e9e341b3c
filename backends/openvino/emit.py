"""From a lowered program to `model.xml` and `model.bin`: OpenVINO reads the ONNX model and makes FakeQuantize of it."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from tfqc.codegen.artifact import Artifact
from tfqc.codegen.onnx.extra import needed
from tfqc.codegen.onnx.writing import WEIGHTS, onnx_model
from tfqc.errors import TfqcError
from tfqc.files.storage import write_tensors
from tfqc.ir.program import Program
from tfqc.ir.render import render

MODEL, VALUES = "model.xml", "model.bin"


def emit(program: Program) -> Artifact:
    """Files of a lowered program. Values lie in `model.bin`, weights as integers.

    Raises:
        TfqcError: torch.onnx does not write one of its operations, or OpenVINO does not read it.
    """
    openvino = needed("openvino", "openvino")
    with tempfile.TemporaryDirectory(prefix="tfqc-") as made:
        folder = Path(made)
        (folder / "model.onnx").write_bytes(onnx_model(program))
        write_tensors(folder / WEIGHTS, program.tensors)
        try:
            model = openvino.Core().read_model(str(folder / "model.onnx"))
            _name(model)
            openvino.save_model(model, str(folder / MODEL), compress_to_fp16=False)
        except Exception as error:
            why = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")[:300].rstrip(".")
            raise TfqcError(f"OpenVINO does not read {program.model}: {why}.") from error
        files = {name: (folder / name).read_bytes() for name in (MODEL, VALUES)}
    return Artifact({"program.ir": render(program)}, {}, binaries=files)


def _name(model: Any) -> None:
    """Names by place in the model where OpenVINO has counted all that this process has made."""
    for number, node in enumerate(model.get_ordered_ops()):
        kind = node.get_type_name()
        if re.fullmatch(rf"{kind}_\d+", node.get_friendly_name()):
            node.set_friendly_name(f"{kind}.{number}")
