"""What a model is calibrated on that no sampler makes images with."""

from __future__ import annotations

import torch

from tfqc.sampling.calls import ModelCalls
from tfqc.sampling.data import Calibration
from tfqc.sampling.schedule import SamplingSchedule


def without_sampler(
    sample: str,
    dtype: torch.dtype,
    time: str | None,
    schedule: SamplingSchedule | None,
    data: Calibration | ModelCalls | None,
) -> tuple[SamplingSchedule | None, Calibration | ModelCalls | None]:
    """Schedule and data as passes need them; as they are for a model that a sampler calls.

    A model that is told no time needs no schedule: all its steps are one. Where its sampler is not known, or what it
    denoises are whole numbers (tokens), it is called with the noise itself.

    Args:
        sample, dtype: what the noise is given as. time: the input that the time is in, None where there is none.
    """
    lacks_times = isinstance(data, Calibration) and bool(data.following)  # which follow those of a schedule
    if schedule is None and time is None and not lacks_times:
        schedule = SamplingSchedule((0.0,))
    if not isinstance(data, Calibration) or schedule is None:
        return schedule, data
    if not dtype.is_floating_point or (time is None and schedule.cannot_sample):
        return schedule, ModelCalls.of_noise(data, sample, dtype, time, schedule.timesteps)
    return schedule, data
