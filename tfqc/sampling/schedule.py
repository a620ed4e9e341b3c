"""The timesteps that a sampler visits, and the sampler itself."""

from __future__ import annotations

import bisect
import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tfqc.errors import CalibrationError
from tfqc.files.storage import parse_json
from tfqc.runtime.plan import as_time
from tfqc.sampling.scheduler import (
    cannot_sample,
    describe,
    identity,
    is_scheduler,
    rebuild,
    scheduler_class,
    set_to,
    steps_of,
)

_LARGEST = 3e38  # models take timesteps in float32


@dataclass(frozen=True)
class SamplingSchedule:
    """`timesteps` as the model is called with them, in visiting order, each once, and the scheduler that visits them.

    Times are numbers in float32, of any sign and order: timesteps, sigmas, their logarithms, flow times from 0 to 1.

    `sampler` describes the scheduler as JSON: its class name under `_class_name`, its configuration, its number of
    steps (`_steps`), what else it was set to (`_state`), and pairs of its timestep and what the model is called with
    there (`_times`) where these are not the same. It is empty when only the times are known, which is enough for
    everything but sampling. `own` is the scheduler itself where an object was given; it is copied for each use.

    Raises:
        CalibrationError: no timesteps, or one that is no finite number.
    """

    timesteps: tuple[float, ...]
    sampler: Mapping[str, Any] = field(default_factory=dict[str, Any])
    own: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise CalibrationError("The schedule is empty: give at least one timestep, or steps=N.")
        if bad := [t for t in self.timesteps if not _is_timestep(t)]:
            raise CalibrationError(f"The schedule holds {str(bad[0])[:50]}, which is no timestep.")
        pairs = self.sampler.get("_times", ())
        if not isinstance(pairs, (list, tuple)) or not all(map(_is_pair, pairs)):
            raise CalibrationError("The schedule's sampler has _times that are no pairs of timesteps.")
        object.__setattr__(self, "timesteps", tuple(dict.fromkeys(map(as_time, self.timesteps))))

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def of(
        cls, scheduler: Any, steps: int | None = None, times: Callable[[Any], Any] | None = None
    ) -> SamplingSchedule:
        """From a scheduler (set to `steps` if given and it is not), a sequence of timesteps, or a schedule.

        Args:
            times: what the model is called with where the scheduler is at a timestep, if that is another number, such
                as `lambda t: t / 1000`.

        Raises:
            CalibrationError: the scheduler has not been set to a number of steps, or cannot be.
        """
        if isinstance(scheduler, SamplingSchedule):
            return scheduler
        if not is_scheduler(scheduler):
            given = scheduler.tolist() if hasattr(scheduler, "tolist") else scheduler
            if not isinstance(given, Sequence):
                raise CalibrationError(
                    f"A {type(scheduler).__name__} is no scheduler of diffusers, has no set_timesteps as they have, "
                    "and is no list of timesteps."
                )
            return cls(tuple(map(number, given)))
        if steps is not None and steps < 1:
            raise CalibrationError(f"A schedule of {steps} steps visits nothing: give steps=N, at least 1.")
        own = set_to(scheduler, steps)
        sampler = describe(own, steps or steps_of(own) or len(own.timesteps))
        if times is None:
            return cls(tuple(float(t) for t in own.timesteps), sampler, own)
        pairs = {as_time(t): as_time(times(t)) for t in own.timesteps}
        return cls(tuple(pairs.values()), {**sampler, "_times": [list(pair) for pair in pairs.items()]}, own)

    @property
    def cannot_sample(self) -> str:
        """Why images cannot be sampled with it: the end of a sentence; empty if they can."""
        if self.own is not None:
            return cannot_sample(self.own)
        return "" if "_class_name" in self.sampler else "of the schedule only the timesteps are known"

    def scheduler(self) -> Any:
        """The scheduler, a copy of the one that was given or made anew, set as it was.

        Raises:
            CalibrationError: the schedule is a bare list of timesteps, or its sampler is none of diffusers, is not
                configured as that wants, or visits other timesteps.
        """
        if self.own is not None:
            return copy.deepcopy(self.own)
        if "_class_name" not in self.sampler:
            raise CalibrationError("Calibration samples images, so it needs a diffusers scheduler, not bare timesteps.")
        scheduler = rebuild(self.sampler)
        visited = sorted(self.time(t) for t in scheduler.timesteps)
        for t in self.timesteps:
            if not math.isclose(t, nearest(t, visited), rel_tol=1e-4, abs_tol=1e-6):
                raise CalibrationError(
                    f"The schedule's sampler does not visit timestep {t:g} in {self.sampler['_steps']} steps."
                )
        return scheduler

    def time(self, t: Any) -> float:
        """What the model is called with where the scheduler is at its timestep t.

        Raises:
            CalibrationError: that was told for other timesteps alone, which do not lie on a line.
        """
        t, known = as_time(t), {as_time(a): as_time(b) for a, b in self.sampler.get("_times", ())}
        if not known or t in known:
            return known[t] if known else t
        first, last = min(known), max(known)
        slope = (known[last] - known[first]) / ((last - first) or math.inf)
        line = {a: known[first] + slope * (a - first) for a in (*known, t)}
        lies = all(math.isclose(line[a], b, rel_tol=1e-3, abs_tol=1e-6) for a, b in known.items())
        if not lies or len(known) < 2 or not _is_timestep(line[t]):
            raise CalibrationError(f"What the model is called with at the scheduler's timestep {t:g} is not known.")
        return as_time(line[t])

    def identity(self) -> str:
        """What tells it from another: timesteps, the scheduler and all that it was set to."""
        return self.to_json() + ("" if self.own is None else identity(self.own))

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"timesteps": list(self.timesteps), "sampler": dict(self.sampler)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, what: str = "The text") -> SamplingSchedule:
        """Inverse of `to_json`; a list of timesteps is a schedule, too.

        Raises:
            CalibrationError: no JSON, no schedule, or a sampler that diffusers does not have.
        """
        wanted = f"{what} holds no schedule: give a list of timesteps, or {{timesteps, sampler}}, as JSON."
        try:
            value = parse_json(text, what, CalibrationError)
            its = _Schedule.model_validate({"timesteps": value} if isinstance(value, list) else value)
        except CalibrationError as error:
            raise CalibrationError(wanted, str(error)) from None
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part)[:50] for part in first["loc"])
            raise CalibrationError(wanted, f"{where}: {first['msg']}") from None
        schedule = cls(tuple(its.timesteps), its.sampler)
        if "_class_name" in schedule.sampler:
            scheduler_class(schedule.sampler["_class_name"])
        return schedule


class _Schedule(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    timesteps: list[float]
    sampler: dict[str, JsonValue] = {}


def number(value: Any) -> Any:
    """A tensor or an array of one value as a number; anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value


def nearest(t: float, of: Sequence[float]) -> float:
    """The number that is nearest to a timestep, of ascending ones; infinity if there are none."""
    at = bisect.bisect(of, t)
    return min(of[max(at - 1, 0) : at + 1], key=lambda other: abs(other - t), default=math.inf)


def _is_timestep(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return is_number and bool(-_LARGEST < value < _LARGEST)


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_timestep, value))
