"""Models that an engine of another project runs, called like the model that was captured."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.errors import ArtifactError
from tfqc.files.storage import read_text
from tfqc.ir.interpret import plan_of
from tfqc.ir.match import returned_by
from tfqc.ir.parse import parse
from tfqc.runtime import Plan, Stepper


class SessionModel(Stepper):
    """Its session finds the row of a timestep by itself, so the plan has none.

    Args:
        directory: of the artifact; its `program.ir` says how the model is called.
        taken: the inputs that the session takes.

    Raises:
        ArtifactError: the program cannot be read.
    """

    engine = ""

    def __init__(self, directory: Path, taken: list[str]) -> None:
        program = parse(read_text(directory / "program.ir", ArtifactError))
        plan = plan_of(program)
        super().__init__(
            Plan(
                plan.inputs, plan.arguments, plan.constants, plan.guards, per_image=plan.per_image, outputs=plan.outputs
            )
        )
        self._taken = taken
        returned = returned_by(program.step)
        self._returns_tuple = isinstance(returned, (tuple, list))
        outputs: Any = returned if self._returns_tuple else (returned,)
        types = [program.tensor_type(value) for value in outputs]
        self._complex = [type_ is not None and type_.dtype.is_complex for type_ in types]

    @abstractmethod
    def infer(self, given: Mapping[str, Any]) -> list[Any]:
        """Outputs of a session, numpy arrays as its inputs by name are."""

    def move(self, device: torch.device) -> None:
        """Refused, but for the CPU."""
        if device.type != "cpu":
            raise ValueError(f"This model runs in {self.engine} on the CPU, not on {device}.")

    def step(self, /, **values: Tensor) -> Any:
        """One timestep, or one after the other where images have several: the model takes one row of the schedule."""
        clock, outputs = self.plan.time, list[Tensor]()
        if clock is None:
            outputs = self._run_session(values)
        else:
            times = values[clock.name]
            if times.is_floating_point() and not clock.dtype.is_floating_point:
                times = times.round().to(clock.dtype)  # what a session takes; it finds the nearest row
            for t in dict.fromkeys(times.tolist()):
                found = self._run_session({**values, clock.name: torch.full_like(times, t)})
                pairs = zip(found, outputs or found, strict=True)
                outputs = [torch.where(_like(times == t, new), new, old) for new, old in pairs]
        return tuple(outputs) if self._returns_tuple else outputs[0]

    def _run_session(self, values: dict[str, Tensor]) -> list[Tensor]:
        given = {name: _pairs(values[name].detach()).contiguous().numpy() for name in self._taken}
        made = zip(map(torch.from_numpy, self.infer(given)), self._complex, strict=True)
        return [torch.view_as_complex(value) if is_complex else value for value, is_complex in made]


def _pairs(value: Tensor) -> Tensor:
    """What engines know of complex numbers: their real and their imaginary parts, side by side."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def not_taken(engine: str, file: Path, error: Exception) -> ArtifactError:
    """What is said of a file that an engine does not take."""
    why = next(iter(str(error).splitlines()), "")[:300].rstrip(".")
    return ArtifactError(f"{engine} does not take {file}: {why}.")


def _like(mask: Tensor, of: Tensor) -> Tensor:
    """One truth for each image, shaped to choose among rows; all of what has no row for each."""
    if of.shape[:1] != mask.shape:
        return torch.ones((), dtype=torch.bool)
    return mask.reshape(-1, *[1] * (of.dim() - 1))
