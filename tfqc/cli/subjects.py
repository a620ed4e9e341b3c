"""What a command samples from: a model by name, or a compiled artifact."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfqc.codegen.artifact import MANIFEST, read_manifest
from tfqc.errors import ArtifactError, TfqcError
from tfqc.models.find import builtin_names, find_model
from tfqc.models.spec import ModelSpec
from tfqc.runtime.plan import as_time
from tfqc.sampling.schedule import SamplingSchedule

STEPS = 50  # of a model that has no schedule of its own


@dataclass(frozen=True)
class Subject:
    """A denoiser and how to sample it.

    steps: the number that it was compiled for, None for a model. sizes: bytes by what they are. time_of: what it is
    called with, for a timestep of the scheduler.
    """

    name: str
    denoiser: Callable[..., Any]
    spec: ModelSpec
    scheduler: Any
    steps: int | None
    sizes: dict[str, int]
    time_of: Callable[[Any], float] = as_time


def subject(name: str, model: str | None = None) -> Subject:
    """An artifact's directory, or what `find_model` knows.

    Args:
        model: what the artifact was made from, where that is no built-in model.

    Raises:
        TfqcError: nothing is found, an artifact is not whole, or there is no scheduler to sample with.
    """
    found = _artifact(name, model) if is_artifact(name) else _model(name)
    if found.scheduler is None:
        raise TfqcError(
            f"{name} has no scheduler to sample with: give a diffusers folder with one, or a factory that returns "
            "a ModelSpec with a scheduler."
        )
    return found


def is_artifact(name: str) -> bool:
    """True for a directory with a manifest, also if a save of it was killed before it was in its place."""
    if os.path.lexists(name):
        return os.path.lexists(Path(name) / MANIFEST)
    try:
        return bool(read_manifest(name))
    except ArtifactError:
        return False


def model_sizes(spec: ModelSpec) -> dict[str, int]:
    """Bytes of a model's parameters in fp32 and in fp16."""
    count = sum(p.numel() for p in spec.model.parameters())
    return {"fp32": 4 * count, "fp16": 2 * count}


def artifact_sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of an artifact: `total`, and of each file."""
    files = {name: int(entry["bytes"]) for name, entry in manifest["files"].items()}
    return {"total": sum(files.values()), **files}


def _model(name: str) -> Subject:
    spec = find_model(name)
    steps = getattr(spec.scheduler, "num_inference_steps", None)
    return Subject(name, spec.model, spec, spec.scheduler, steps, model_sizes(spec))


def _artifact(name: str, model: str | None) -> Subject:
    import tfqc

    manifest = read_manifest(name)
    made_from = str(manifest["model"])
    if model is None and made_from not in builtin_names():
        raise TfqcError(
            f"{name} was made from {made_from!r}, which is no built-in model: say with --model where that model is, "
            "so that its inputs and scheduler are known."
        )
    denoiser = tfqc.load(name)
    spec = find_model(model or made_from)
    schedule = manifest["schedule"]
    sizes = artifact_sizes(manifest)
    if schedule is None:
        return Subject(name, denoiser, spec, spec.scheduler, None, sizes)
    own = SamplingSchedule(tuple(schedule["timesteps"]), schedule["sampler"])
    steps = own.sampler.get("_steps")
    # A scheduler that is not of diffusers is made again by nobody but the model's factory.
    scheduler = own.scheduler() if "_class_name" in own.sampler else spec.scheduler
    return Subject(name, denoiser, spec, scheduler, steps, sizes, own.time)
