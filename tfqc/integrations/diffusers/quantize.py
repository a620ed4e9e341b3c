"""`tfqc.quantize`: the denoisers of a diffusers pipeline compiled and put back, in one line."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from tfqc.arguments import check_others, read_pipeline, read_plan, read_step_policy, read_target, whole
from tfqc.codegen.artifact import Artifact, check_output
from tfqc.codegen.target import Target
from tfqc.driver import compile
from tfqc.errors import CalibrationError, CaptureError, SpecError, TfqcError
from tfqc.frontend.dynamic import DynamicDims
from tfqc.frontend.taken import inputs_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.integrations.diffusers.bars import Bars
from tfqc.integrations.diffusers.datafree import without_data
from tfqc.integrations.diffusers.layers import restored
from tfqc.integrations.diffusers.parts import ALL, DENOISER, beside, compile_part
from tfqc.integrations.diffusers.place import denoisers_of, into, place_of
from tfqc.integrations.diffusers.prompts import Prompts, model_inputs, runs_of
from tfqc.integrations.diffusers.sizes import alike, differing_sizes, with_sizes
from tfqc.integrations.diffusers.temporary import Temporary
from tfqc.ir.program import Role
from tfqc.passing.pipeline import Pipeline
from tfqc.progress import Progress
from tfqc.quant.step_policy import StepPolicy, policy_in
from tfqc.sampling.recording import Recording, record_each

NONE = "none"


def quantize(
    pipe: Any,
    target: str | Target = "cpu-int8",
    *,
    steps: int | None = None,
    calibration: Prompts = None,
    call: Mapping[str, Any] | None = None,
    strategy: str = "fold",
    pipeline: str | Pipeline | None = None,
    plan: str | Path | None = None,
    step_policy: StepPolicy | Mapping[str, Any] | Path | None = None,
    dynamic: DynamicDims | None = None,
    parts: str | Sequence[str] = DENOISER,
    seed: int = 0,
    directory: str | Path | None = None,
    progress: Progress | None = None,
    require_real: bool = False,
) -> Any:
    """Compile the denoiser of a diffusers pipeline, put the result in its place, and return the pipeline.

    The pipeline is run for calibration, so text encoders, guidance, scheduler and sizes are its own. Two denoisers that
    share its steps are compiled each on the calls that reach it. Until all are ready the pipeline is left as it is.

    Args:
        pipe: a loaded pipeline with a `unet` or a `transformer`.
        target: what to compile for.
        steps: of the sampler; the pipeline's default if None. Other numbers of steps work afterwards, too.
        calibration: how many of the default prompts (4), prompts, the Path of a file with a prompt in each line, the
            Path of a folder of images (for inpainting with NAME.mask.png beside NAME.png), latents [N, ...], keyword
            arguments of the pipeline for each run (`[{"prompt": ..., "image": ...}]`), or calls of the denoiser that
            you recorded (`[{"sample": x, "timestep": t, ...}, ...]`). "none": no data; weights get their own ranges,
            activations those that each token has at run time, and the pipeline is run once with its denoiser silent,
            which tells shapes and times.
        call: keyword arguments of the pipeline in every run, such as `height`, `width` and `guidance_scale`.
        strategy, pipeline, plan, dynamic, require_real: as `tfqc.compile` has them, for the denoiser.
        step_policy: as `tfqc.compile` has it; of several denoisers those in its scope.
        parts: what else is compiled for the target: "all", or names such as "vae" and "text_encoder". They have no
            time; of an autoencoder it is what the pipeline calls of `encoder` and `decoder`. Of "all", what cannot be
            compiled stays as it is, and a warning says why.
        seed: of the noise.
        directory: where the artifact is kept, of several denoisers each under its name; a temporary one if None
            (`pipe.save_pretrained` copies it).
        progress: told what is done; bars as the pipeline's own if None, which
            `pipe.set_progress_bar_config(disable=True)` switches off.

    Raises:
        TfqcError: what, where, and what to do.
    """
    denoisers, others = denoisers_of(pipe), beside(pipe, parts)
    if directory is not None:
        check_output(directory)
    _check(target, pipeline, strategy, plan, dynamic, seed, progress, steps, call)
    progress = progress or Bars(getattr(pipe, "_progress_bar_config", {}))
    policies = _policies(pipe, denoisers, read_step_policy(step_policy))
    told = not (isinstance(calibration, str) and calibration == NONE)
    own_target = target = read_target(target)
    if not told and pipeline is None:
        target, pipeline = without_data(target, strategy)
    if isinstance(calibration, Iterable) and not isinstance(calibration, (str, Tensor, Mapping)):
        calibration = list(calibration)  # pyright: ignore[reportAssignmentType, reportUnknownArgumentType]
    further: dict[str, list[Mapping[str, Any]]] = {}
    if (given := model_inputs([getattr(pipe, part) for part in denoisers], calibration)) is not None:
        if others:
            raise CalibrationError("Calls of the denoiser tell nothing of other parts: give prompts, or no parts.")
        recordings = {denoisers[0]: [Recording([dict(call) for call in given])]}
    else:
        runs = runs_of(pipe, calibration if told else 1, _common(pipe, steps, call or {}), seed, whole=bool(others))
        recordings = _recorded(pipe, denoisers, others, runs, progress, run_denoisers=told)
        further = _of_another_prompt(pipe, denoisers, runs[0])
    kept = None if directory is not None else Temporary()
    where = kept.path / "artifact" if kept else Path(str(directory))
    several, made = len(denoisers) + len(others) > 1, list[str]()

    def save(place: str, artifact: Artifact) -> None:
        artifact.save(place_of(where, place, several))
        made.append(place)

    for place, module in others.items():
        if not any(each.calls for each in recordings[place]):
            continue  # the pipeline has no use for it
        try:
            save(place, compile_part(module, recordings[place], own_target, seed, progress))
        except TfqcError as error:
            if parts != ALL:
                raise
            warnings.warn(f"The {place} of this {type(pipe).__name__} stays as it is: {error}", stacklevel=2)
    for part in denoisers:
        found = recordings[part]
        model = restored(unwrapped(getattr(pipe, part)))
        calls = [call for recording in found for call in recording.calls]
        example = {name: value for name, value in calls[0].items() if name != "return_dict"}
        time = next((item.path[0] for item, _ in inputs_of(model, example) if item.role is Role.TIME), None)
        options: dict[str, Any] = {
            "schedule": None if time is None else next(each for each in found if each.calls).schedule(time),
            "pipeline": pipeline,
            "strategy": strategy,
            "plan": plan,
            "step_policy": policies[part],
            "example_inputs": example,
            "seed": seed,
            "progress": progress,
            "require_real": require_real,
        }
        sizes = differing_sizes(model, [*calls, *further.get(part, [])])
        calls = calls if told else calls[:1]
        try:
            artifact = compile(model, target, calibration=calls, dynamic=with_sizes(dynamic, sizes), **options)
        except CaptureError as error:
            if not sizes:
                raise
            artifact = compile(model, target, calibration=alike(model, calls), dynamic=dynamic, **options)
            what = ", ".join(f"{name}[{dim}]" for name, dims in sizes.items() for dim in dims)
            warnings.warn(
                f"The {part} of this {type(pipe).__name__} takes {what} as in its first call, no other sizes: {error}",
                stacklevel=2,
            )
        save(part, artifact)
    into(where, pipe)
    for place in made:
        getattr(pipe, place.partition(".")[0]).kept = kept  # as long as the part is
    return pipe


def _check(
    target: Any, pipeline: Any, strategy: Any, plan: Any, dynamic: Any, seed: Any, progress: Any, steps: Any, call: Any
) -> None:
    """Refuse what `compile` would refuse behind the runs of the pipeline, which may take an hour."""
    read_plan(plan, read_pipeline(pipeline, read_target(target), strategy))
    check_others(None, None, dynamic, seed, None, None, progress)
    if steps is not None:
        whole("steps", steps, CalibrationError, least=1)
    if call is not None and not isinstance(call, Mapping):
        raise TfqcError(f"call={str(call)[:50]} is no mapping from names of the pipeline's arguments to values.")


def _recorded(
    pipe: Any,
    parts: Sequence[str],
    others: Mapping[str, Module],
    runs: Sequence[Mapping[str, Any]],
    progress: Progress,
    run_denoisers: bool,
) -> dict[str, list[Recording]]:
    """What each denoiser and each other part was called with in each run."""
    models = [getattr(pipe, part) for part in parts]
    found: dict[str, list[Recording]] = {part: [] for part in (*parts, *others)}
    with _quiet(pipe), _refusing(pipe):
        for run in progress.track(runs, "running the pipeline for calibration", len(runs)):
            made = record_each(pipe, models, run, run_denoisers=run_denoisers, beside=list(others.values()))
            for part, recording in zip(found, made, strict=True):
                found[part].append(recording)
    for part in parts:
        if any(recording.changed for recording in found[part]):
            raise CalibrationError(
                f"{type(pipe).__name__} changes the attention of its {part} while it runs, which no compiled model "
                "can follow: switch that off (of perturbed attention guidance by call={'pag_scale': 0.0})."
            )
        if not any(recording.calls for recording in found[part]):
            raise CalibrationError(
                f"{type(pipe).__name__} did not call its {part}: take a number of steps at which it does, or a "
                f"pipeline without it ({part}=None)."
            )
    return found


def _of_another_prompt(pipe: Any, parts: Sequence[str], run: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Calls of each denoiser, which answers with zeros, for a prompt of another length: where that gives another number
    of tokens, all prompts of a calibration may have had the same by chance."""
    if not isinstance(run.get("prompt"), str):
        return {}
    prompt = run["prompt"]  # a shorter one, where there is: of a longer one tokenizers may say that they cut it
    other = {**run, "prompt": "a fox" if len(prompt.split()) > 2 else f"{prompt} in the snow"}
    models = [getattr(pipe, part) for part in parts]
    try:
        with _quiet(pipe):
            made = record_each(pipe, models, other)
    except Exception:  # a prompt that this pipeline does not take tells nothing
        return {}
    return {part: list[Mapping[str, Any]](recording.calls) for part, recording in zip(parts, made, strict=True)}


def _policies(pipe: Any, parts: Sequence[str], given: StepPolicy | None) -> dict[str, StepPolicy]:
    """The policy of each denoiser: what was given, or its own config's, where it is in the scope."""
    found = {part: given or policy_in(unwrapped(getattr(pipe, part)).config) or StepPolicy() for part in parts}
    if given is not None and not set(parts) & set(given.scope):
        raise SpecError(
            f"The step policy is for {', '.join(given.scope)}, and this {type(pipe).__name__} has "
            f"{', '.join(parts)}: name it in the policy's scope."
        )
    for part, policy in found.items():
        if given is None and policy != StepPolicy() and part not in policy.scope:
            warnings.warn(
                f"The {part}'s own step policy is for {', '.join(policy.scope)}, so it is not carried out: give "
                "step_policy= where it is meant for it.",
                stacklevel=3,
            )
    return {part: policy if part in policy.scope else StepPolicy() for part, policy in found.items()}


def _common(pipe: Any, steps: int | None, call: Mapping[str, Any]) -> dict[str, Any]:
    takes = inspect.signature(pipe.__call__).parameters
    count = {} if steps is None or "num_inference_steps" not in takes else {"num_inference_steps": steps}
    return {**count, **call}


@contextmanager
def _refusing(pipe: Any) -> Generator[None]:
    """What a pipeline says of its arguments, in a sentence that says where they come from."""
    try:
        yield
    except TfqcError:
        raise
    except Exception as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CalibrationError(
            f"{type(pipe).__name__} does not run on what calibration gives it ({why[:200].rstrip('.')}): give what a "
            "run of it needs, as call={...} for all runs or calibration=[{...}, ...] for each."
        ) from error


@contextmanager
def _quiet(pipe: Any) -> Generator[None]:
    """No progress bars of the pipeline: there is one for all runs."""
    own = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(own or {}), "disable": True})
    try:
        yield
    finally:
        if own is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = own
