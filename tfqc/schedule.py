"""The timesteps that a sampler visits, and the sampler itself."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tfqc.errors import CalibrationError


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
        if bad := [t for t in self.timesteps if not math.isfinite(t) or t < 0]:
            raise CalibrationError(f"The schedule holds {bad[0]}, which is no timestep.")
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
        if isinstance(scheduler, Sequence):
            return cls(tuple(float(t) for t in scheduler))
        config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
        config["_class_name"] = type(scheduler).__name__
        own = type(scheduler).from_config(config)
        steps = steps or getattr(scheduler, "num_inference_steps", None)
        if steps is None or steps < 1:
            raise CalibrationError("The scheduler has no number of steps: give steps=N, or call set_timesteps(N).")
        own.set_timesteps(steps)
        # Samplers of higher order visit some timesteps twice.
        timesteps = dict.fromkeys(float(t) for t in own.timesteps)
        return cls(tuple(timesteps), {**config, "_steps": steps})

    def scheduler(self) -> Any:
        """The diffusers scheduler, made anew and set to its number of steps.

        Raises:
            CalibrationError: the schedule is a bare list of timesteps.
        """
        import diffusers

        if "_class_name" not in self.sampler:
            raise CalibrationError("Calibration samples images, so it needs a diffusers scheduler, not bare timesteps.")
        cls = getattr(diffusers, str(self.sampler["_class_name"]))
        scheduler = cls.from_config({k: v for k, v in self.sampler.items() if not k.startswith("_")})
        scheduler.set_timesteps(self.sampler["_steps"])
        return scheduler

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"timesteps": list(self.timesteps), "sampler": dict(self.sampler)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SamplingSchedule:
        """Inverse of `to_json`."""
        value = json.loads(text)
        return cls(tuple(value["timesteps"]), value["sampler"])
