"""Timesteps and samplers."""

from __future__ import annotations

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfqc.errors import CalibrationError
from tfqc.sampling.schedule import SamplingSchedule

TIMES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, unique=True).map(tuple)


@given(TIMES)
def test_json_loses_nothing(timesteps: tuple[float, ...]) -> None:
    schedule = SamplingSchedule(timesteps, {"_class_name": "DDIMScheduler", "steps_offset": 1})
    assert SamplingSchedule.from_json(schedule.to_json()) == schedule
    assert len(schedule) == len(timesteps)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ((), "The schedule is empty: give at least one timestep, or steps=N."),
        ((1e39,), "The schedule holds 1e+39, which is no timestep."),
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


@given(TIMES)
def test_times_in_any_order_each_once(timesteps: tuple[float, ...]) -> None:
    """Flow times rise from 0 to 1, a sampler of second order comes back, ln(sigma) is negative below 1."""
    assert SamplingSchedule((*timesteps, *timesteps[::-1])).timesteps == tuple(dict.fromkeys(timesteps))


def test_times_are_known_in_float32() -> None:
    """As calls bring them: a consistency model's are float64."""
    third = torch.tensor(1 / 3, dtype=torch.float64)
    want = (float(third.float()),)
    assert SamplingSchedule((1 / 3,)).timesteps == SamplingSchedule.of(third[None]).timesteps == want
    assert SamplingSchedule.of(np.array([1 / 3, np.float32(1 / 3)])).timesteps == want


@pytest.mark.parametrize("given", [("a",), (True,), (None,), ([1],), (10**400,), (1 + 2j,)])
def test_what_is_no_number_is_refused(given: Any) -> None:
    for make in (SamplingSchedule, SamplingSchedule.of):
        with pytest.raises(CalibrationError, match=r"which is no timestep"):
            make(given)


@pytest.mark.parametrize("given", ["ddim", 7, {"a": 1}, object(), None])
def test_what_is_no_schedule_is_refused(given: Any) -> None:
    with pytest.raises(CalibrationError, match=r"is no timestep|is no scheduler of diffusers"):
        SamplingSchedule.of(given)


def test_arrays_are_lists_of_timesteps() -> None:
    assert SamplingSchedule.of(torch.tensor([9, 5])) == SamplingSchedule.of(np.array([9.0, 5.0]))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[" * 100_000, "null", "3", '"text"', "{}", '{"steps": 3}', '{"timesteps": 3}', '{"timesteps": {}}',
        '{"timesteps": ["1"]}', '{"timesteps": [true]}', '{"timesteps": [null]}', '{"timesteps": [[1]]}',
        '{"timesteps": [1], "sampler": []}', '{"timesteps": [1], "sampler": null}', '{"timesteps": [1], "extra": 1}',
        '{"timesteps": [1], "timesteps": [2]}', '{"timesteps": [1], "sampler": ' + '{"a":' * 70 + "1" + "}" * 71,
        '[1, "\\ud800"]', "[" + "9" * 5000 + "]",
    ],
)  # fmt: skip
def test_text_that_holds_no_schedule(text: str) -> None:
    with pytest.raises(CalibrationError, match=r"^The text holds no schedule: give a list of timesteps") as caught:
        SamplingSchedule.from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["[NaN]", "[Infinity]", "[1e999]", "[]", "[-1e39]"])
def test_text_of_what_no_sampler_visits(text: str) -> None:
    with pytest.raises(CalibrationError, match=r"The schedule (is|holds)"):
        SamplingSchedule.from_json(text)


@pytest.mark.parametrize(
    "name",
    ["Nope", "UNet2DModel", "SchedulerMixin", "schedulers", "scheduling_ddim", "__class__", "DDIMScheduler.__init__",
     "KarrasDiffusionSchedulers", "logging", "utils", "", 3, None, ["DDIMScheduler"], "x" * 10_000],
)  # fmt: skip
def test_a_sampler_is_a_scheduler_of_diffusers(name: Any) -> None:
    sampler = {"_class_name": name, "_steps": 3}
    with pytest.raises(CalibrationError, match=r"^diffusers has no scheduler"):
        SamplingSchedule((1.0,), sampler).scheduler()
    with pytest.raises(CalibrationError, match=r"^diffusers has no scheduler"):
        SamplingSchedule.from_json(json.dumps({"timesteps": [1], "sampler": sampler}))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"_steps": None}, "has no number of steps"), ({"_steps": 0}, "has no number of steps"),
        ({"_steps": -3}, "has no number of steps"), ({"_steps": "3"}, "has no number of steps"),
        ({"_steps": 2.0}, "has no number of steps"), ({"_steps": True}, "has no number of steps"),
        ({"_steps": 10**12}, "has no number of steps"), ({"_steps": 5000}, "cannot be set to 5000 steps"),
        ({"num_train_timesteps": 10**12}, "has num_train_timesteps above"),
        ({"num_train_timesteps": -5}, "cannot be set to 4 steps"),
        ({"num_train_timesteps": "many"}, "cannot be set to 4 steps"),
        ({"beta_schedule": "Nope"}, "cannot be set to 4 steps"), ({"beta_schedule": None}, "cannot be set to 4 steps"),
        ({"trained_betas": {"a": 1}}, "cannot be set to 4 steps"),
        ({"_steps": 5}, "does not visit timestep 750 in 5 steps"),
    ],
)  # fmt: skip
def test_a_sampler_that_cannot_be_made(changes: dict[str, Any], why: str) -> None:
    schedule = SamplingSchedule.of(diffusers.DDIMScheduler(), 4)
    with pytest.raises(CalibrationError, match=why):
        SamplingSchedule(schedule.timesteps, {**schedule.sampler, **changes}).scheduler()


@pytest.mark.parametrize("steps", [0, -1, 5000])
def test_numbers_of_steps_that_a_scheduler_does_not_take(steps: int) -> None:
    with pytest.raises(CalibrationError, match=r"steps"):
        SamplingSchedule.of(diffusers.DDIMScheduler(), steps)


def test_infinite_settings_of_a_scheduler_come_back() -> None:
    schedule = SamplingSchedule.of(diffusers.DPMSolverMultistepScheduler(), 4)
    assert schedule.sampler["lambda_min_clipped"] == -math.inf
    again = SamplingSchedule.from_json(schedule.to_json())
    assert again == schedule and len(again.scheduler().timesteps) == 4
