"""A saved ONNX model, run by onnxruntime and called like the model that was captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.backends.onnx.extra import needed
from tfqc.errors import ArtifactError
from tfqc.files.storage import read_text
from tfqc.ir.interpret import plan_of
from tfqc.ir.parse import parse
from tfqc.runtime import Plan, Stepper


class OnnxModel(Stepper):
    """Its session finds the row of a timestep by itself, so the plan has none.

    Raises:
        ArtifactError: onnxruntime does not take the model.
    """

    def __init__(self, directory: Path) -> None:
        program = parse(read_text(directory / "program.ir", ArtifactError))
        plan = plan_of(program)
        super().__init__(
            Plan(
                plan.inputs, plan.arguments, plan.constants, plan.guards, per_image=plan.per_image, outputs=plan.outputs
            )
        )
        onnxruntime = needed("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(directory / "model.onnx"), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            why = next(iter(str(error).splitlines()), "")[:300].rstrip(".")
            raise ArtifactError(f"onnxruntime does not take {directory / 'model.onnx'}: {why}.") from error
        self._taken = [i.name for i in self._session.get_inputs()]
        self._returns_tuple = isinstance(next(n for n in program.step.nodes if n.op == "output").args[0], (tuple, list))

    def move(self, device: torch.device) -> None:
        """Refused, but for the CPU."""
        if device.type != "cpu":
            raise ValueError(f"This model runs in onnxruntime on the CPU, not on {device}.")

    def step(self, /, **values: Tensor) -> Any:
        """One timestep, or one after the other where images have several: the model takes one row of the schedule."""
        clock, outputs = self.plan.time, list[Tensor]()
        if clock is None:
            outputs = self._run_session(values)
        else:
            times = values[clock.name]
            for t in dict.fromkeys(times.tolist()):
                found = self._run_session({**values, clock.name: torch.full_like(times, t)})
                pairs = zip(found, outputs or found, strict=True)
                outputs = [torch.where(_like(times == t, new), new, old) for new, old in pairs]
        return tuple(outputs) if self._returns_tuple else outputs[0]

    def _run_session(self, values: dict[str, Tensor]) -> list[Tensor]:
        given = {name: values[name].contiguous().numpy() for name in self._taken}
        return [torch.from_numpy(out) for out in self._session.run(None, given)]


def _like(mask: Tensor, of: Tensor) -> Tensor:
    """One truth for each image, shaped to choose among rows; all of what has no row for each."""
    if of.shape[:1] != mask.shape:
        return torch.ones((), dtype=torch.bool)
    return mask.reshape(-1, *[1] * (of.dim() - 1))
