"""`tfqc.quantize`: the denoisers of a diffusers pipeline compiled and put back, in one line."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tfqc.arguments import read_target
from tfqc.codegen.artifact import check_output
from tfqc.codegen.target import Target
from tfqc.driver import compile
from tfqc.errors import CalibrationError
from tfqc.frontend.dynamic import DynamicDims
from tfqc.frontend.taken import inputs_of
from tfqc.frontend.unwrap import unwrapped
from tfqc.integrations.diffusers.datafree import without_data
from tfqc.integrations.diffusers.layers import restored
from tfqc.integrations.diffusers.place import denoisers_of, into, place_of
from tfqc.integrations.diffusers.prompts import Prompts, model_inputs, runs_of
from tfqc.ir.program import Role
from tfqc.passing.pipeline import Pipeline
from tfqc.progress import Progress, Silent
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
    dynamic: DynamicDims | None = None,
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
        strategy, pipeline, plan, dynamic, require_real: as `tfqc.compile` has them.
        seed: of the noise.
        directory: where the artifact is kept, of several denoisers each under its name; a temporary one if None
            (`pipe.save_pretrained` copies it).
        progress: told what is done.

    Raises:
        TfqcError: what, where, and what to do.
    """
    parts = denoisers_of(pipe)
    if directory is not None:
        check_output(directory)
    progress = progress or Silent()
    told = not (isinstance(calibration, str) and calibration == NONE)
    if not told and pipeline is None:
        target, pipeline = without_data(read_target(target), strategy)
    if isinstance(calibration, Iterable) and not isinstance(calibration, (str, Tensor, Mapping)):
        calibration = list(calibration)  # pyright: ignore[reportAssignmentType, reportUnknownArgumentType]
    if (given := model_inputs([getattr(pipe, part) for part in parts], calibration)) is not None:
        recordings = {parts[0]: [Recording([dict(call) for call in given])]}
    else:
        runs = runs_of(pipe, calibration if told else 1, _common(pipe, steps, call or {}), seed)
        recordings = _recorded(pipe, parts, runs, progress, run_denoisers=told)
    kept = None if directory is not None else _Temporary()
    where = kept.path / "artifact" if kept else Path(str(directory))
    for part, found in recordings.items():
        model = restored(unwrapped(getattr(pipe, part)))
        calls = [call for recording in found for call in recording.calls]
        example = {name: value for name, value in calls[0].items() if name != "return_dict"}
        time = next((item.path[0] for item, _ in inputs_of(model, example) if item.role is Role.TIME), None)
        artifact = compile(
            model,
            target,
            schedule=None if time is None else next(each for each in found if each.calls).schedule(time),
            calibration=calls if told else calls[:1],
            pipeline=pipeline,
            strategy=strategy,
            plan=plan,
            example_inputs=example,
            dynamic=dynamic,
            seed=seed,
            progress=progress,
            require_real=require_real,
        )
        artifact.save(place_of(where, part, parts))
    into(where, pipe)
    for part in parts:
        getattr(pipe, part).kept = kept  # as long as the denoiser is
    return pipe


def _recorded(
    pipe: Any, parts: Sequence[str], runs: Sequence[Mapping[str, Any]], progress: Progress, run_denoisers: bool
) -> dict[str, list[Recording]]:
    """What each denoiser was called with in each run."""
    models = [getattr(pipe, part) for part in parts]
    found: dict[str, list[Recording]] = {part: [] for part in parts}
    with _quiet(pipe):
        for run in progress.track(runs, "running the pipeline for calibration", len(runs)):
            made = record_each(pipe, models, run, run_denoisers=run_denoisers)
            for part, recording in zip(parts, made, strict=True):
                found[part].append(recording)
    for part, recordings in found.items():
        if not any(recording.calls for recording in recordings):
            raise CalibrationError(
                f"{type(pipe).__name__} did not call its {part}: take a number of steps at which it does, or a "
                f"pipeline without it ({part}=None)."
            )
    return found


class _Temporary:
    """A directory that lives as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tfqc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _common(pipe: Any, steps: int | None, call: Mapping[str, Any]) -> dict[str, Any]:
    takes = inspect.signature(pipe.__call__).parameters
    count = {} if steps is None or "num_inference_steps" not in takes else {"num_inference_steps": steps}
    return {**count, **call}


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
