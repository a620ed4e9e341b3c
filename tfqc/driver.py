"""From a model to an artifact and back: capture, the pipeline, the backend."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tfqc
from tfqc.artifact import Artifact, check_files
from tfqc.backend import compromises, refusals
from tfqc.calibration import Calibration
from tfqc.errors import ArtifactError, TfqcError
from tfqc.frontend import capture
from tfqc.frontend.inputs import DynamicDims
from tfqc.instruments import Instrument, VerifyEach
from tfqc.ir.program import Program, Stage
from tfqc.models import ModelSpec, find_model, from_diffusers
from tfqc.passing import Context, Progress, Silent
from tfqc.pipeline import Pipeline
from tfqc.registry import find_backend
from tfqc.runtime import VERSION, Stepper
from tfqc.schedule import SamplingSchedule
from tfqc.target import Target

Compilable = str | ModelSpec | torch.nn.Module | Program | Any


def compile(
    model: Compilable,
    target: str | Target = "fake-quant",
    *,
    schedule: Any = None,
    steps: int | None = None,
    calibration: Calibration | int | None = None,
    pipeline: str | Pipeline | None = None,
    strategy: str = "fold",
    example_inputs: Mapping[str, Any] | None = None,
    roles: Mapping[str, str] | None = None,
    dynamic: DynamicDims | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
    require_real: bool = False,
) -> Artifact:
    """Compile a denoiser for a target.

    Args:
        model: a module, a diffusers pipeline, a captured Program, a `ModelSpec`, or a name that `find_model` knows.
        target: such as `fake-quant{weights=4 activations=8}`.
        schedule: a diffusers scheduler, a sequence of timesteps, or a SamplingSchedule; the model's own by default.
        steps: how many steps of it; needed unless the scheduler has been set.
        calibration: data, or a number of images to draw (16 by default).
        pipeline: your own, instead of the target's default for `strategy`.
        strategy: how temporal features are kept (`tfqc.recipes.STRATEGIES`).
        example_inputs, roles: for `capture`, where the model's class does not tell.
        dynamic: dimensions that may differ from call to call, beside the batch: `{"sample": {2: "H", 3: "W"}}`.
        seed: of the calibration images and of everything drawn.
        workdir: where calibration trajectories are kept; they are used again if the same compile is interrupted.
        instruments: watch the passes; the verifier by default.
        progress: told what is done, how far, how long.
        require_real: refuse, before anything is emitted, what the target would run in another way than it promises.

    Raises:
        TfqcError: what, where, and what to do.
    """
    target = Target.parse(target) if isinstance(target, str) else target
    backend = target.backend
    if pipeline is None:
        pipeline = backend.pipeline(target.options, strategy)
    passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    passes = passes + Pipeline(backend.legalize(target.options))
    spec = None if isinstance(model, Program) else _spec(model, example_inputs, roles)
    if schedule is None and spec is not None:
        schedule = spec.scheduler
    context = Context(
        schedule=None if schedule is None else SamplingSchedule.of(schedule, steps),
        calibration=_calibration(spec, calibration, seed),
        seed=seed,
        workdir=workdir,
        progress=progress or Silent(),
    )
    context.report += backend.remarks(target.options)
    if spec is not None and spec.conditions_are_random and not isinstance(calibration, Calibration):
        context.report.append("calibrated on random conditions: give your own for quality that counts")
    # Everything that can be refused is refused before the model is captured.
    start = model if isinstance(model, Program) else None
    passes.check(start.stage if start else Stage.CAPTURED, list(start.tables) if start else (), context)
    if start is None:
        assert spec is not None
        context.progress.say(f"capturing {spec.name}")
        program = capture(
            spec.model, spec.example_inputs, roles=roles or spec.roles, name=spec.name, dynamic=dynamic or spec.dynamic
        )
    else:
        program = start.clone()
    if not program.has_weights:
        raise TfqcError("The model has no weights (it lies on the meta device), so it cannot be calibrated.")
    passes.run(program, context, [VerifyEach()] if instruments is None else instruments)
    if refused := refusals(backend, program, target.options):
        raise TfqcError(f"{target.name} does not run {len(refused)} operations of {program.model}.", *refused)
    if found := compromises(backend, program, target.options):
        if require_real:
            raise TfqcError(f"{target.name} has no kernel for {len(found)} operations of {program.model}.", *found)
        context.report += found
    artifact = backend.emit(program, target.options)
    artifact.facts |= _facts(program, target, passes, context)
    return artifact


def load(directory: str | Path, *, check_finite: bool = False) -> torch.nn.Module:
    """Load a saved artifact; it is called like the model that was captured.

    The directory is taken for data, whoever made it: the model is rebuilt from the artifact's program and tensors, and
    no code in the directory runs. `tfqc.runtime.load` runs it, without the compiler.

    Args:
        check_finite: raise FloatingPointError at the first NaN or infinity, naming layer and step.

    Raises:
        ArtifactError: a file is missing or changed, or the format is newer than this tfqc.
    """
    directory = Path(directory).resolve()
    manifest = check_files(directory)
    if manifest["backend"] is None:
        raise ArtifactError(f"{directory} does not say which backend it is for: compile the model again.")
    model = find_backend(manifest["backend"])().load(directory)
    if isinstance(model, Stepper):
        model.reload, model.check_finite = (load, str(directory)), check_finite
    return model


def _spec(model: Compilable, example: Mapping[str, Any] | None, roles: Mapping[str, str] | None) -> ModelSpec:
    if isinstance(model, ModelSpec):
        return model
    if isinstance(model, str):
        return find_model(model)
    if example is not None and isinstance(model, torch.nn.Module):
        return ModelSpec(type(model).__name__, model, example, roles=roles)
    return from_diffusers(model)


def _calibration(spec: ModelSpec | None, given: Calibration | int | None, seed: int) -> Calibration | None:
    if isinstance(given, Calibration):
        return given
    if spec is None:
        return None
    return spec.calibration(16 if given is None else given, seed)


def _facts(program: Program, target: Target, passes: Pipeline, context: Context) -> dict[str, Any]:
    data = context.calibration
    used = any("calibration" in p.data for p in passes.passes)
    schedule = context.schedule
    return {
        "backend": target.name,
        "runtime": VERSION,
        "target": str(target),
        "pipeline": str(passes),
        "model": program.model,
        "inputs": [{"path": list(i.path), "role": str(i.role), "type": str(i.type)} for i in program.inputs],
        "schedule": None
        if schedule is None
        else {"timesteps": list(schedule.timesteps), "sampler": dict(schedule.sampler)},
        "calibration": {"images": len(data), "seed": data.seed, "guidance": data.guidance} if data and used else None,
        "seed": context.seed,
        "report": context.report,
        "versions": {
            "tfqc": tfqc.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "diffusers", "safetensors")},
        },
    }
