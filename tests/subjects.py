"""Models as the passes behind discover-tib meet them: captured, analysed, with a schedule and with calls to make."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.helpers import first, with_batch
from tests.models import MODELS, Example
from tfqc.frontend import capture
from tfqc.instruments import CheckNumerics, VerifyEach
from tfqc.ir.parse import parse
from tfqc.ir.program import Program, Role
from tfqc.ir.render import render
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule

TIMESTEPS = (951.0, 701.0, 421.0, 37.0)

# Models captured once more, with their class labels declared as a finite set.
LABELLED = {"dit-labels": ("dit", 10), "unet2d-labels": ("unet2d-classes", 10)}
SUBJECTS = (*MODELS, *LABELLED)


@dataclass(frozen=True)
class Subject:
    """A model, example inputs of batch 2, and its program after discover-tib (every reader has its own)."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    discovered: Program

    @property
    def program(self) -> Program:
        return self.discovered.clone()

    @property
    def fractional(self) -> bool:
        """True for a model whose timesteps are fractions of 1."""
        return self.discovered.input(Role.TIME)[0].type.dtype.is_floating_point

    @property
    def timesteps(self) -> tuple[float, ...]:
        return tuple(t / 1000 for t in TIMESTEPS) if self.fractional else TIMESTEPS

    def context(self, **others: Any) -> Context:
        return Context(schedule=SamplingSchedule(self.timesteps), **others)

    def call(self, timesteps: list[float], **changed: Any) -> dict[str, Any]:
        """Inputs of a batch, one timestep for each entry."""
        time = self.discovered.input(Role.TIME)[0].path[0]
        dtype = torch.float32 if self.fractional or any(t != int(t) for t in timesteps) else torch.int64
        return {**with_batch(self.inputs, len(timesteps)), time: torch.tensor(timesteps, dtype=dtype), **changed}

    def calls(self) -> Iterator[dict[str, Any]]:
        """Batches of 1, 2 and 3 at every timestep, and batches of mixed ones."""
        for batch in (1, 2, 3):
            for t in self.timesteps:
                yield self.call([t] * batch)
        for batch in (2, 3):
            yield self.call(list(self.timesteps[:batch]))
            yield self.call(list(reversed(self.timesteps))[:batch])

    def reference(self, call: Mapping[str, Any]) -> Tensor:
        """What the model itself answers."""
        with torch.no_grad():
            return first(self.model(**call))

    def run(
        self, text: str, ctx: Context | None = None, program: Program | None = None, numerics: bool = False
    ) -> Program:
        """A pipeline on the analysed program, verified; `numerics` holds every pass to what it declares of them."""
        ctx = self.context() if ctx is None else ctx
        program = self.program if program is None else program
        return Pipeline.parse(text).run(program, ctx, [VerifyEach(), *([CheckNumerics()] if numerics else [])])


Subjects = Callable[[str], Subject]


@functools.cache
def _labelled(name: str) -> Subject:
    base, labels = LABELLED[name]
    model, inputs = MODELS[base]()
    program = capture(model, inputs, domains={"class_labels": labels})
    return Subject(name, model, inputs, Pipeline.parse("normalize,discover-tib").run(program))


@functools.cache
def of_example(name: str, make: Callable[[], Example]) -> Subject:
    """A subject from a model that one test module has for itself."""
    model, inputs = make()
    program = Pipeline.parse("normalize,discover-tib").run(capture(model, inputs))
    return Subject(name, model, inputs, program)


def find_subject(name: str, example: Callable[[str], Example], discovered: Callable[[str], Program]) -> Subject:
    """A subject by its name in `SUBJECTS`."""
    return _labelled(name) if name in LABELLED else Subject(name, *example(name), discovered(name))


def calibration(subject: Subject, images: int = 3, batch_size: int = 2, **others: Any) -> Calibration:
    """Noise, and the example's request inputs in turn."""
    noisy, time = (subject.discovered.input(role)[0] for role in (Role.SAMPLE, Role.TIME))
    inputs = with_batch(subject.inputs, images)
    latents = torch.randn(inputs[noisy.path[0]].shape, generator=torch.Generator().manual_seed(1))
    cond: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    rows = {".".join(i.path): i.type.shape[:1] == ("B",) for i in subject.discovered.inputs}

    def walk(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, (*path, key))
        elif path[0] not in (noisy.path[0], time.path[0]):
            (cond if rows.get(".".join(path), True) else shared)[".".join(path)] = value

    walk(inputs, ())
    return Calibration(latents, cond, batch_size=batch_size, shared=shared, **others)


def assert_text_round_trip(program: Program, call: Mapping[str, Any]) -> None:
    """Parsing what was rendered gives the same text, and the same outputs bit for bit."""
    text = render(program)
    again = parse(text, program.tensors)
    assert render(again) == text
    with torch.no_grad():
        assert torch.equal(first(again(**call)), first(program(**call)))
