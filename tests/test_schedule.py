"""Timesteps and samplers."""

from __future__ import annotations

import json

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import CalibrationError
from tfqc.schedule import SamplingSchedule

FALLING = st.lists(st.floats(0, 1e4), min_size=1, unique=True).map(lambda t: tuple(sorted(t, reverse=True)))


@given(FALLING)
def test_json_loses_nothing(timesteps: tuple[float, ...]) -> None:
    schedule = SamplingSchedule(timesteps, {"_class_name": "DDIMScheduler", "steps_offset": 1})
    assert SamplingSchedule.from_json(schedule.to_json()) == schedule
    assert len(schedule) == len(timesteps)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((), "The schedule is empty: give at least one timestep, or steps=N."),
        ((1.0, 2.0), "timestep 2 follows 1;"),
        ((2.0, 1.0, 1.0), "timestep 1 follows 1;"),
        ((2.0, -1.0), "The schedule holds -1.0, which is no timestep."),
        ((float("nan"),), "The schedule holds nan, which is no timestep."),
        ((float("inf"), 1.0), "The schedule holds inf, which is no timestep."),
    ],
)
def test_what_no_sampler_visits_is_refused(timesteps: tuple[float, ...], message: str) -> None:
    with pytest.raises(CalibrationError) as error:
        SamplingSchedule(timesteps)
    assert message in str(error.value)


def test_a_schedule_of_timesteps_alone() -> None:
    schedule = SamplingSchedule.of([9, 5, 0])
    assert schedule == SamplingSchedule((9.0, 5.0, 0.0))
    assert SamplingSchedule.of(schedule) is schedule
    with pytest.raises(CalibrationError, match="needs a diffusers scheduler, not bare timesteps"):
        schedule.scheduler()


def test_a_scheduler_comes_back_from_json_with_the_same_timesteps() -> None:
    original = diffusers.DDIMScheduler(num_train_timesteps=100, steps_offset=1)
    schedule = SamplingSchedule.of(original, 5)
    assert original.num_inference_steps is None  # the caller's scheduler is left alone
    again = SamplingSchedule.from_json(schedule.to_json())
    scheduler = again.scheduler()
    assert type(scheduler) is diffusers.DDIMScheduler
    assert scheduler.config["steps_offset"] == 1
    assert tuple(map(float, scheduler.timesteps)) == schedule.timesteps == (81.0, 61.0, 41.0, 21.0, 1.0)


def test_the_number_of_steps_is_taken_from_the_scheduler_or_asked_for() -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(CalibrationError, match=r"give steps=N, or call set_timesteps\(N\)"):
        SamplingSchedule.of(scheduler)
    scheduler.set_timesteps(4)
    assert len(SamplingSchedule.of(scheduler)) == 4
    assert len(SamplingSchedule.of(scheduler, 2)) == 2


def test_a_timestep_that_a_sampler_visits_twice_counts_once() -> None:
    heun = SamplingSchedule.of(diffusers.HeunDiscreteScheduler(), 4)
    assert len(heun) == 4
    assert len(heun.scheduler().timesteps) == 7


def test_the_text_is_plain_json() -> None:
    text = SamplingSchedule.of(diffusers.EulerDiscreteScheduler(), 3).to_json()
    assert json.loads(text)["sampler"]["_class_name"] == "EulerDiscreteScheduler"


@given(FALLING)
def test_any_order_but_the_falling_one_is_refused(timesteps: tuple[float, ...]) -> None:
    if len(timesteps) > 1:
        with pytest.raises(CalibrationError, match="unsorted"):
            SamplingSchedule(timesteps[::-1])
