"""From a model to an artifact and back: capture, the pipeline, the backend."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfqc.analysis.left import check_quantized, left_in_floating_point
from tfqc.analysis.weighted import WEIGHTED, check_weights, multiplies_stored
from tfqc.arguments import (
    check_others,
    is_number,
    read_calibration,
    read_pipeline,
    read_plan,
    read_schedule,
    read_step_policy,
    read_target,
)
from tfqc.codegen.artifact import Artifact, check_files
from tfqc.codegen.backend import Backend
from tfqc.codegen.known import find_backend
from tfqc.codegen.left import MadeBy
from tfqc.codegen.support import compromised, grouped, refused, remarks_on
from tfqc.codegen.target import Target
from tfqc.errors import ArtifactError, CalibrationError, CaptureError, PassError, TfqcError
from tfqc.files.storage import tensors_hash
from tfqc.frontend import capture
from tfqc.frontend.dynamic import DynamicDims, places, read_dynamic
from tfqc.frontend.inputs import Example, Roles, off_default
from tfqc.frontend.taken import inputs_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.instruments import Instrument, VerifyEach
from tfqc.ir.interpret import plan_of
from tfqc.ir.ops import op_name
from tfqc.ir.program import Program, Role, Stage
from tfqc.ir.rows import Quantizer, QuantPlan
from tfqc.models.find import denoiser_in, find_model, from_diffusers
from tfqc.models.recorded import recorded_schedule
from tfqc.models.spec import ModelSpec
from tfqc.passing.context import Context
from tfqc.passing.order import tables_of
from tfqc.passing.pipeline import Pipeline
from tfqc.passing.remarks import Remark
from tfqc.progress import Progress, Silent
from tfqc.quant.plan import is_float
from tfqc.quant.step_policy import StepPolicy, policy_in, policy_of, with_policy
from tfqc.recipe import Recipe, check_recipe
from tfqc.runtime import VERSION, Stepper
from tfqc.runtime.origin import Origin
from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import is_scheduler
from tfqc.sampling.unsampled import without_sampler
from tfqc.version import __version__

CalibrationData = Calibration | ModelCalls | Mapping[str, Any] | Tensor | int | None
Compilable = str | ModelSpec | torch.nn.Module | Program | Any


def compile(
    model: Compilable,
    target: str | Target = "fake-quant",
    *,
    schedule: Any = None,
    steps: int | None = None,
    calibration: Calibration
    | ModelCalls
    | Mapping[str, Any]
    | Tensor
    | Iterable[Mapping[str, Any]]
    | int
    | None = None,
    pipeline: str | Pipeline | None = None,
    strategy: str = "fold",
    plan: str | Path | None = None,
    step_policy: StepPolicy | Mapping[str, Any] | Path | None = None,
    example_inputs: Example | None = None,
    roles: Roles | None = None,
    dynamic: DynamicDims | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    instruments: Sequence[Instrument] | None = None,
    progress: Progress | None = None,
    require_real: bool = False,
    recipe: Recipe | None = None,
) -> Artifact:
    """Compile a denoiser for a target.

    Args:
        model: a module, a diffusers pipeline, a captured Program, a `ModelSpec`, or a name that `find_model` knows.
        target: such as `fake-quant{weights=4 activations=8}`.
        schedule: a diffusers scheduler, a sequence of timesteps, or a SamplingSchedule; the model's own by default.
        steps: how many steps of it; needed unless the scheduler has been set.
        calibration: data, a number of images to draw (16 by default), unit noise [N, ...], inputs by name, N rows each
            (what they leave out is drawn), or calls of the model that you recorded: for each its arguments by name.
            With calls, the schedule may be a list of times, and is theirs by default.
        pipeline: your own, instead of the target's default for `strategy`.
        strategy: how temporal features are kept (`tfqc.codegen.recipes.STRATEGIES`).
        plan: what is quantized to what, layer by layer: text as `tfqc inspect --plan` prints it, or the Path of a file;
            what it does not speak of is planned by the pipeline's options.
        step_policy: steps at which inputs of layers stay in floating point (`tfqc.quant.step_policy`): what stands
            under `diffusion_step_policy`, or the Path of a config.json; by default what the model's own config says.
        example_inputs, roles: for `capture`, where the model's class does not tell.
        dynamic: dimensions that may differ from call to call, beside the batch: "H,W" (as `capture` has them).
        seed: of the calibration images and of everything drawn.
        workdir: where calibration trajectories are kept; they are used again if the same compile is interrupted.
        instruments: watch the passes; the verifier by default.
        progress: told what is done, how far, how long.
        require_real: refuse, before anything is calibrated, products with weights that the target would not run on its
            kernels, in integers.
        recipe: what the other arguments come from (`tfqc.compile(**recipe)`): kept in the manifest.

    Raises:
        TfqcError: what, where, and what to do.
    """
    if recipe is not None:
        check_recipe(
            recipe, model=model, target=target, schedule=schedule, steps=steps, calibration=calibration,
            pipeline=pipeline, strategy=strategy, plan=plan, step_policy=step_policy, dynamic=dynamic, seed=seed,
            require_real=require_real,
        )  # fmt: skip
    target = read_target(target)
    backend = target.backend
    if require_real and backend.simulates:
        raise TfqcError(
            f"{target.name} computes in floating point what it quantizes, so nothing of it is real: leave require_real "
            "(--require-real) out, or take a target with kernels."
        )
    passes = read_pipeline(pipeline, target, strategy) + Pipeline(tuple(backend.legalize(target.options)))
    own_plan = read_plan(plan, passes)
    check_others(roles, example_inputs, dynamic, seed, workdir, instruments, progress)
    policy = read_step_policy(step_policy)
    data = read_calibration(calibration)
    own_schedule = read_schedule(schedule, steps)
    spec = None if isinstance(model, Program) else _spec(model, example_inputs, roles, dynamic)
    if policy is None and spec is not None:
        policy = policy_in(getattr(spec.model, "config", None))
    if policy is not None:
        passes = with_policy(passes, policy)
    told = _sample_and_time(model if isinstance(model, Program) else spec)
    if own_schedule is None and steps is None and spec is not None and isinstance(data, ModelCalls) and told[2]:
        own_schedule = SamplingSchedule(data.times(told[2]))
    own_schedule, not_recorded = _schedule(model, spec, own_schedule, steps)
    drawn = _calibration(spec, data, seed)
    own_schedule, calibrated_on = without_sampler(*told, own_schedule, drawn)
    context = Context(
        schedule=own_schedule,
        calibration=_grouped(model, calibrated_on) if isinstance(model, Program) else calibrated_on,
        seed=seed,
        workdir=None if workdir is None else Path(workdir),
        progress=progress or Silent(),
        plan=own_plan,
    )
    context.remarks += backend.remarks(target.options)
    if not_recorded:
        why = {"pipeline": type(model).__name__, "why": not_recorded}
        context.remarks.append(Remark("compile", "times-not-recorded", "", why))
    if spec is not None and spec.conditions_are_random and not isinstance(data, (Calibration, ModelCalls)):
        context.remarks.append(Remark("compile", "random-conditions"))
    # Everything that can be refused is refused before the model is captured.
    start = model if isinstance(model, Program) else None
    tensors = start.tensors.values() if start is not None else spec.model.parameters() if spec is not None else ()
    if any(t.is_meta for t in tensors):
        raise TfqcError("The model has no weights (it lies on the meta device), so it cannot be calibrated.")
    passes.check(start.stage if start else Stage.CAPTURED, tables_of(start) if start else (), context, program=start)
    if start is None:
        assert spec is not None
        context.progress.say(f"capturing {spec.name}")
        program = capture(spec.model, spec.example_inputs, roles=spec.roles, name=spec.name, dynamic=spec.dynamic)
        for argument, value in off_default(unwrapped(spec.model), program.constants).items():
            context.remarks.append(
                Remark("compile", "fixed-argument", "", {"argument": argument, "value": repr(value)})
            )
        shared = {".".join(i.path) for i in program.input(Role.REQUEST) if i.type.shape[:1] != ("B",)}
        if not shared.isdisjoint(context.calibration.cond if context.calibration else ()):
            drawn = _calibration(replace(spec, shared=frozenset(shared)), data, seed)
            context.calibration = without_sampler(*told, own_schedule, drawn)[1]
    else:
        program = start.clone()
        if own_plan:
            program.tables.pop(QuantPlan.table, None)
    if isinstance(drawn, ModelCalls):
        drawn.check_fixed(program)
    if isinstance(program.batch, int) and isinstance(drawn, Calibration):
        context.calibration = without_sampler(*told, own_schedule, drawn.in_batches(program.batch))[1]
    elif start is None:
        context.calibration = _grouped(program, context.calibration)
    check_weights(program)
    made_from = None if recipe is None else recipe.facts(tensors_hash(program.tensors.items()))
    _rehearse(passes, program, context, target, require_real)
    made = MadeBy()
    instruments = [*([VerifyEach()] if instruments is None else instruments), made]
    passes.run(program, context, instruments)
    if _quantizes(passes) and not is_float(program):
        check_quantized(program)
    context.remarks += _refuse(backend, program, target, require_real, made) + _left(program)
    for instrument in instruments:
        instrument.said(context.remarks)
    program.stage = Stage.LOWERED  # also where there was nothing to quantize: the backend runs all that is left
    program.tables.pop(QuantPlan.table, None)  # it has been carried out
    artifact = backend.emit(program, target.options)
    if not isinstance(artifact, Artifact):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TfqcError(f"{type(backend).__name__}.emit returned a {type(artifact).__name__}: give an Artifact.")
    artifact.facts |= _facts(program, target, passes, context)
    if (kept := policy_of(passes, policy.scope if policy else ("transformer",))) is not None:
        artifact.facts["step_policy"] = kept.to_config()
    if made_from is not None:
        artifact.facts["recipe"] = made_from
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
        model.reload, model.check_finite = Origin.of(load, directory), check_finite
    return model


def _rehearse(passes: Pipeline, program: Program, context: Context, target: Target, require_real: bool) -> None:
    """Find what would be refused behind a calibration of minutes before it begins."""
    if not any({"weights", "calibration"} & item.contract().data for item in passes.passes):
        return
    context.progress.say("checking what the target makes of it")
    made = MadeBy()
    try:
        rehearsed = passes.rehearse(program, context, [made])
    except PassError as error:
        if error.__cause__ is None:
            raise
        return  # a pass that does not do without values: the run tells what there is to tell
    if _quantizes(passes) and not is_float(rehearsed):
        check_quantized(rehearsed)
    _refuse(target.backend, rehearsed, target, require_real, made)


def _quantizes(passes: Pipeline) -> bool:
    return any(Quantizer in item.contract().provides for item in passes.passes)


def _refuse(backend: Backend, program: Program, target: Target, require_real: bool, made: MadeBy) -> list[Remark]:
    """Refuse what the backend does not run; what it runs in another way is returned as remarks."""
    if found := refused(backend, program, target.options):
        found = [(node, f"{because}; {made.of(node)}") for node, because in found]
        lines = grouped(program, found)
        what = f"{len(found)} operation{'s' if len(found) > 1 else ''} of {program.model}"
        raise TfqcError(f"{target.name} does not run {what}.", *lines)
    found = compromised(backend, program, target.options)
    products = [(node, because) for node, because in found if multiplies_stored(node)]
    if products and require_real:
        lines = grouped(program, products)
        what = f"{len(products)} product{'s' if len(products) > 1 else ''} of {program.model}"
        raise TfqcError(f"{target.name} has no kernel for {what}.", *lines)
    return remarks_on(program, found, target.name)


def _left(program: Program) -> list[Remark]:
    found: list[Remark] = []
    for node, weight in left_in_floating_point(program):
        its = WEIGHTED[node.target]
        told = {"at": program.at(node), "operation": op_name(node.target), "does": its.does}
        found.append(Remark("compile", "float-product", node.name, {**told, "weight": weight, "why": its.why_not}))
    return found


def _spec(model: Compilable, example: Example | None, roles: Roles | None, dynamic: DynamicDims | None) -> ModelSpec:
    spec = find_model(model) if isinstance(model, str) else unwrapped(model)
    if not isinstance(spec, ModelSpec):
        spec = _of_module(spec, example)
    spec = replace(
        spec,
        example_inputs=example or spec.example_inputs,
        roles=roles or spec.roles,
        dynamic=dynamic or spec.dynamic,
    )
    # What is wrong with them is said before anything is drawn for them.
    found = dict(inputs_of(spec.model, spec.example_inputs, spec.roles))
    places(read_dynamic(spec.dynamic), found, {i.path: tuple(tensor.shape) for i, tensor in found.items()})
    return spec


def _of_module(model: Any, example: Example | None) -> ModelSpec:
    if isinstance(model, type) or not (isinstance(model, torch.nn.Module) or _denoiser(model) is not None):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise CaptureError(
            f"{kind[0].upper()}{kind[1:]} is no model: give a torch module, a diffusers pipeline with a unet or "
            "transformer, a folder, a name, or a Program."
        )
    if example is None:
        return from_diffusers(model)
    denoiser = model if isinstance(model, torch.nn.Module) else _denoiser(model)
    assert denoiser is not None
    return ModelSpec(type(denoiser).__name__, denoiser, example, getattr(model, "scheduler", None))


def _schedule(
    model: Compilable, spec: ModelSpec | None, given: SamplingSchedule | None, steps: int | None
) -> tuple[SamplingSchedule | None, str]:
    """The schedule to compile for: the one given, or what a pipeline calls its model with, or the model's own
    scheduler; and why what a pipeline does could not be recorded."""
    if given is not None or spec is None:
        return given, ""
    why = ""
    timed = spec.time_name() is not None
    if timed and callable(model) and not isinstance(model, torch.nn.Module) and is_scheduler(spec.scheduler):
        given, why = recorded_schedule(model, spec, steps)
    return given or read_schedule(spec.scheduler, steps), why


def _sample_and_time(model: Program | ModelSpec | None) -> tuple[str, torch.dtype, str | None]:
    """Dotted name and dtype of what is denoised, and the input that the time is in, if the model is told one."""
    assert model is not None
    if isinstance(model, ModelSpec):
        return *model.sample_input(), model.time_name()
    name, dtype = next((".".join(i.path), i.type.dtype) for i in model.input(Role.SAMPLE))
    return name, dtype, next((i.path[0] for i in model.input(Role.TIME)), None)


def _denoiser(pipeline: Any) -> torch.nn.Module | None:
    part = denoiser_in(pipeline)
    return unwrapped(getattr(pipeline, part)) if part else None


def _grouped(program: Program, data: Calibration | ModelCalls | None) -> Calibration | ModelCalls | None:
    """Recorded calls as a program of a fixed number of images takes them."""
    if isinstance(data, ModelCalls) and isinstance(program.batch, int):
        return data.in_groups(plan_of(program))
    return data


def _calibration(spec: ModelSpec | None, given: CalibrationData, seed: int) -> Calibration | ModelCalls | None:
    if isinstance(given, (Calibration, ModelCalls)):
        return given
    if isinstance(given, Mapping) or (isinstance(given, Tensor) and not is_number(given)):
        if spec is None:
            raise CalibrationError("A captured Program has no example inputs to complete these: give Calibration data.")
        return spec.calibration_of(given, seed)
    if spec is None:
        if given is not None:
            raise CalibrationError(
                f"A captured Program has no example inputs to draw {int(given)} images for: give Calibration data, or "
                "calls of the model."
            )
        return None
    return spec.calibration(16 if given is None else int(given), seed)


def _facts(program: Program, target: Target, passes: Pipeline, context: Context) -> dict[str, Any]:
    data = context.calibration
    used = any("calibration" in p.contract().data for p in passes.passes)
    schedule = context.schedule
    return {
        "backend": target.name,
        "runtime": VERSION,
        "target": str(target),
        "pipeline": str(passes),
        "plan": context.plan,
        "model": program.model,
        "inputs": [{"path": list(i.path), "role": str(i.role), "type": str(i.type)} for i in program.inputs],
        "schedule": None
        if schedule is None
        else {"timesteps": list(schedule.timesteps), "sampler": dict(schedule.sampler)},
        "calibration": {"images": len(data), "seed": data.seed, "guidance": data.guidance} if data and used else None,
        "seed": context.seed,
        "report": list(context.report),
        "remarks": [remark.to_json() for remark in context.remarks],
        "versions": {
            "tfqc": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "diffusers", "safetensors")},
        },
    }
