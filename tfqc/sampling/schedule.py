"""The timesteps that a sampler visits, and the sampler itself."""

from __future__ import annotations

import bisect
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from tfqc.errors import CalibrationError, suggest
from tfqc.files.storage import parse_json
from tfqc.quiet import quiet_import

_LARGEST = 3e38  # models take timesteps in float32
MOST_STEPS = 10_000  # of a sampler, and of what it was trained with: some need memory for their product


@dataclass(frozen=True)
class SamplingSchedule:
    """`timesteps` in visiting order (strictly falling), and the diffusers scheduler that visits them.

    `sampler` holds the scheduler's class name under `_class_name` and its configuration; empty when only the
    timesteps are known, which is enough for everything but calibration data.

    Raises:
        CalibrationError: no timesteps, or timesteps that do not fall.
    """

    timesteps: tuple[float, ...]
    sampler: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not self.timesteps:
            raise CalibrationError("The schedule is empty: give at least one timestep, or steps=N.")
        if bad := [t for t in self.timesteps if not _is_timestep(t)]:
            raise CalibrationError(f"The schedule holds {str(bad[0])[:50]}, which is no timestep.")
        falling = list(zip(self.timesteps, self.timesteps[1:], strict=False))
        if rising := [(a, b) for a, b in falling if b >= a]:
            a, b = rising[0]
            raise CalibrationError(
                f"The schedule is unsorted: timestep {b:g} follows {a:g}; a sampler visits timesteps from high to low."
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    @classmethod
    def of(cls, scheduler: Any, steps: int | None = None) -> SamplingSchedule:
        """From a diffusers scheduler (set to `steps` if given), a sequence of timesteps, or a schedule.

        Raises:
            CalibrationError: the scheduler has not been set to a number of steps, or visits no falling sequence.
        """
        if isinstance(scheduler, SamplingSchedule):
            return scheduler
        scheduler = scheduler.tolist() if hasattr(scheduler, "tolist") else scheduler
        if isinstance(scheduler, Sequence):
            return cls(tuple(float(t) if _is_timestep(t) else t for t in scheduler))
        if not hasattr(scheduler, "config") or not hasattr(type(scheduler), "from_config"):
            raise CalibrationError(
                f"A {type(scheduler).__name__} is no scheduler of diffusers, nor a list of timesteps."
            )
        config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
        config["_class_name"] = type(scheduler).__name__
        steps = getattr(scheduler, "num_inference_steps", None) if steps is None else steps
        if steps is None or steps < 1:
            raise CalibrationError("The scheduler has no number of steps: give steps=N, or call set_timesteps(N).")
        own = _set(type(scheduler), config, steps)
        # Samplers of higher order visit some timesteps twice.
        timesteps = dict.fromkeys(float(t) for t in own.timesteps)
        return cls(tuple(timesteps), {**config, "_steps": steps})

    def scheduler(self) -> Any:
        """The diffusers scheduler, made anew and set to its number of steps.

        Raises:
            CalibrationError: the schedule is a bare list of timesteps, or its sampler is none of diffusers, is not
                configured as that wants, or visits other timesteps.
        """
        if "_class_name" not in self.sampler:
            raise CalibrationError("Calibration samples images, so it needs a diffusers scheduler, not bare timesteps.")
        steps = self.sampler.get("_steps")
        if type(steps) is not int or not 0 < steps <= MOST_STEPS:
            raise CalibrationError(f"The schedule's sampler has no number of steps (_steps) from 1 to {MOST_STEPS}.")
        numbers = {k: abs(v) for k, v in self.sampler.items() if isinstance(v, (int, float))}
        if big := [k for k, v in numbers.items() if MOST_STEPS < v < math.inf]:
            raise CalibrationError(f"The schedule's sampler has {big[0]} above {MOST_STEPS}.")
        scheduler = _set(scheduler_class(self.sampler["_class_name"]), self.sampler, steps)
        visited = sorted(float(t) for t in scheduler.timesteps)
        for t in self.timesteps:
            if not math.isclose(t, nearest(t, visited), rel_tol=1e-4, abs_tol=1e-6):
                raise CalibrationError(f"The schedule's sampler does not visit timestep {t:g} in {steps} steps.")
        return scheduler

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


def scheduler_class(name: Any) -> Any:
    """A scheduler of diffusers by the name of its class; nothing else of diffusers is reached.

    Raises:
        CalibrationError: it has none of this name.
    """
    with quiet_import():
        from diffusers import schedulers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        found = getattr(schedulers, name, None) if isinstance(name, str) and name in _scheduler_names() else None
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin) or not hasattr(found, "set_timesteps"):
        close = suggest(name, _scheduler_names()) if isinstance(name, str) and len(name) < 100 else ""
        raise CalibrationError(f"diffusers has no scheduler {str(name)[:100]!a}.{close}")
    return found


@functools.cache
def _scheduler_names() -> list[str]:
    """What diffusers says it has, without loading it."""
    from diffusers import schedulers

    return [name for name in dir(schedulers) if name.endswith("Scheduler")]


def _set(cls: Any, config: Mapping[str, Any], steps: int) -> Any:
    """A scheduler set to a number of steps. What it makes of a configuration from outside is its own affair."""
    try:
        scheduler = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        scheduler.set_timesteps(steps)
        [float(t) for t in scheduler.timesteps]
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise CalibrationError(f"{cls.__name__} cannot be set to {steps} steps: {why[:300]}.") from error
    return scheduler


def nearest(t: float, of: Sequence[float]) -> float:
    """The number that is nearest to a timestep, of ascending ones; infinity if there are none."""
    at = bisect.bisect(of, t)
    return min(of[max(at - 1, 0) : at + 1], key=lambda other: abs(other - t), default=math.inf)


def _is_timestep(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(0 <= value < _LARGEST)
