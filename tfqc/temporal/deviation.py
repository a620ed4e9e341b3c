"""The third symptom: how far the sampler's trajectory goes astray when only the TIB is quantized."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfqc.calibration.simulate import Simulation
from tfqc.calibration.trajectories import followed, given_once
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program, Role
from tfqc.passing.context import Context
from tfqc.runtime.plan import as_time
from tfqc.sampling.data import Calibration
from tfqc.sampling.loop import sample
from tfqc.sampling.schedule import nearest
from tfqc.temporal.features import tib_run
from tfqc.temporal.strategies import disturbed


def tib_trajectory_deviation(program: Program, ctx: Context, bits: tuple[int, int], images: int) -> tuple[float, ...]:
    """cos(x_t, x̂_t) before each step and of the final x_0, T + 1 values, mean over `images` calibration images.

    Raises:
        PassError: no calibration data, or no schedule.
        CalibrationError: features that depend on request inputs (they would have to be
            disturbed for each image apart).
    """
    if not isinstance(given := ctx.need_calibration(), Calibration):
        raise CalibrationError("The trajectory's deviation is measured on images: give Calibration data, not calls.")
    data = _first(given, images)
    run = tib_run(program, ctx)
    with torch.no_grad():
        exact = run()
    if next(iter(exact.values())).shape[1] > 1:
        raise CalibrationError("The trajectory's deviation is not measured where features depend on the request.")
    wrong = disturbed(program, run, "tib", exact, bits)
    exact_path = _path(program, ctx, data, {})
    wrong_path = _path(program, ctx, data, {name: value[:, 0] for name, value in wrong.items()})
    pairs = zip(exact_path, wrong_path, strict=True)
    return tuple(float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()) for a, b in pairs)


def _first(data: Calibration, images: int) -> Calibration:
    def cut(values: Any) -> Any:
        return None if values is None else {k: v[:images] for k, v in values.items()}

    return dataclasses.replace(
        data, latents=data.latents[:images], cond=cut(data.cond), uncond=cut(data.uncond), batch_size=images
    )


def _path(program: Program, ctx: Context, data: Calibration, features: dict[str, Tensor]) -> list[Tensor]:
    """Latents before each step and at the end, with the given features [T, ...] in the place of computed ones."""
    schedule = ctx.need_schedule()
    run = Simulation(program, program.step)
    wanted = given_once(program, data.following)
    noisy, time = (program.input(role)[0].name for role in (Role.SAMPLE, Role.TIME))
    position, ascending = {t: i for i, t in enumerate(schedule.timesteps)}, sorted(schedule.timesteps)
    what = "sampling with the TIB quantized" if features else "sampling in full precision"
    bar = ctx.progress.track(range(len(schedule.scheduler().timesteps)), what)
    latents: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, /, **conditions: Tensor) -> Tensor:
        next(bar, None)
        at = position[nearest(as_time(t), ascending)]
        run.values = {name: value[at].expand(len(x), *value.shape[1:]) for name, value in features.items()}
        given = {**conditions, **data.shared}
        request = {i.name: given[k].to(i.type.dtype) for k, i in wanted.items() if k in given}
        others = followed(program, data.following, as_time(t), len(x))
        result = run.call({noisy: x, time: t.expand(len(x)), **others, **request})
        return result[0] if isinstance(result, tuple) else result

    final = sample(
        denoiser,
        schedule.scheduler(),
        latents=data.latents,
        cond=data.cond,
        uncond=data.uncond,
        guidance=data.guidance,
        batch_size=data.batch_size,
        seed=data.seed,
        time_of=schedule.time,
        on_step=lambda _index, _t, latent, _output: latents.append(latent),
    )
    for _ in bar:
        pass
    return [*latents, final]
