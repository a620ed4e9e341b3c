"""A denoiser class on the whole path: torch, capture, fake-quant without and with quantization, cpu-int8."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tfqc
from tests.zoo.denoisers.entry import FRACTIONS, Denoiser
from tfqc.codegen.artifact import Artifact
from tfqc.errors import TfqcError
from tfqc.ir.program import Program
from tfqc.ir.rows import Tib
from tfqc.passing.pipeline import Pipeline

EXACT = 1e-5  # what nothing is quantized in answers within
CLOSE = 0.1  # what W8A8 answers within, of random weights
TARGETS = {
    "exact": "fake-quant{weights=none activations=none}",
    "fake_quant": "fake-quant{weights=8 activations=8}",
    "cpu_int8": "cpu-int8",
}
STEPS = 4


@dataclass
class Walk:
    """What became of a class.

    torch: why it does not run there, else empty. seconds: of the capture. features: temporal ones. exact, fake_quant,
    cpu_int8: the largest ‖y - ŷ‖ / ‖y‖ of any output in any call. refused: stage -> sentence.
    """

    torch: str = ""
    seconds: float | None = None
    features: int | None = None
    exact: float | None = None
    fake_quant: float | None = None
    cpu_int8: float | None = None
    refused: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def whole(self) -> bool:
        """True for a class that goes all the way, with answers that are right."""
        small = ((self.exact, EXACT), (self.fake_quant, CLOSE), (self.cpu_int8, CLOSE))
        return not self.torch and all(error is not None and error <= limit for error, limit in small)


def walk(name: str, its: Denoiser, stages: Sequence[str] = tuple(TARGETS)) -> Walk:
    """Take a class through `stages`; what fails at one is told, and the next is tried."""
    found = Walk()
    model = its.model(name)
    try:
        references = [(call, _answers(model, call)) for call in calls(its)]
    except Exception as error:  # whatever it is: the class does not run
        return dataclasses.replace(found, torch=_said(error))
    try:
        began = time.perf_counter()
        program = tfqc.capture(model, its.call(2, _times(its)[0]), roles=its.roles)
        found.seconds = round(time.perf_counter() - began, 1)
        discovered = Pipeline.parse("normalize,discover-tib").run(program.clone())
        found.features = sum(row.part == "feature" for row in discovered.table(Tib).values())
    except Exception as error:
        found.refused["capture"] = _said(error)
        return found
    for stage in stages:
        try:
            if stage == "exact":
                found.exact = _error(_exact(its, model), references)
            else:
                setattr(found, stage, _error(_quantized(its, program, TARGETS[stage]), references))
        except Exception as error:
            found.refused[stage] = _said(error)
    return found


def calls(its: Denoiser) -> Iterator[dict[str, Any]]:
    """Noise: the batch that is captured and others at the first timestep, and one at each of the schedule."""
    times = _times(its)
    for images, t in (*((images, times[0]) for images in (2, 3, 1)), *((2, t) for t in times[1:])):
        yield its.call(images, t, seed=1)


def _scheduler(its: Denoiser) -> Any:
    """One whose timesteps are of the class's kind: whole numbers up to 1000, or fractions of 1."""
    if its.times == FRACTIONS:
        scheduler = diffusers.EDMEulerScheduler(sigma_min=1.2, sigma_max=40.0)
    else:
        scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    return scheduler


def _schedule(its: Denoiser) -> Any:
    """None for a model that is told no time: it needs no schedule."""
    return None if its.times is None else _scheduler(its)


def _times(its: Denoiser) -> list[float]:
    return [0.0] if its.times is None else [float(t) for t in _scheduler(its).timesteps]


def _exact(its: Denoiser, model: nn.Module) -> Artifact:
    """As a user would: from the model."""
    example = its.call(2, _times(its)[0])
    return tfqc.compile(model, TARGETS["exact"], schedule=_schedule(its), example_inputs=example, roles=its.roles)


def _quantized(its: Denoiser, program: Program, target: str) -> Artifact:
    """From the program that is there, on calls as its pipeline makes them, 16 images at each timestep."""
    recorded = [its.call(2, t, seed) for seed in range(2, 2 + its.draws) for t in _times(its)]
    return tfqc.compile(program, target, schedule=_schedule(its), calibration=recorded)


def _error(artifact: Artifact, references: Sequence[tuple[Mapping[str, Any], Any]]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        compiled = tfqc.load(artifact.save(Path(directory) / "out"))
        return max(relative(_answers(compiled, call), reference) for call, reference in references)


def _answers(model: nn.Module, call: Mapping[str, Any]) -> list[Tensor]:
    """All tensors that a call returns, in order."""
    with torch.no_grad():
        answer = model(**call)
    answer = tuple(answer) if isinstance(answer, tuple) else answer
    return [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


def relative(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest ‖y - ŷ‖ / ‖y‖; infinite where the answers have not the same form."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        return float("inf")
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(got, wanted, strict=True))


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, TfqcError) else f"{type(error).__name__}: "
    notes = [str(note) for note in getattr(error, "notes", ())[:2]]
    return " | ".join([f"{kind}{error}".strip()[:400], *(note[:300] for note in notes)])
