"""Schedulers as objects: how one is set, copied as it was set, written down as JSON and made again.

A scheduler of diffusers is described by its class, its configuration and its number of steps. Where `set_timesteps` was
given more (`timesteps`, `sigmas`, `mu`), or was not what set it, what it holds beside is written down too (`_state`).
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfqc.errors import CalibrationError, suggest
from tfqc.quiet import quiet_import

MOST_STEPS = 10_000  # of a sampler, and of what it was trained with: some need memory for their product
_USED = ("is_scale_input_called",)  # truths that tell of use, not of what a scheduler was set to
_STEP = ("model_output", "timestep", "sample")  # what every sampler is given


def is_scheduler(given: Any) -> bool:
    """True for an object that can be set to steps and then has timesteps, of diffusers or not."""
    return not isinstance(given, type) and callable(getattr(given, "set_timesteps", None))


def steps_of(scheduler: Any) -> int | None:
    """The number of steps that a scheduler has been set to; None if it has not been set."""
    steps, timesteps = (getattr(scheduler, name, None) for name in ("num_inference_steps", "timesteps"))
    fresh = _fresh(scheduler)
    its_steps, its_timesteps = (getattr(fresh, name, None) for name in ("num_inference_steps", "timesteps"))
    if timesteps is None or (steps == its_steps and its_timesteps is not None and _equal(timesteps, its_timesteps)):
        return None
    return len(timesteps) if steps is None else int(steps)


def set_to(scheduler: Any, steps: int | None) -> Any:
    """A copy that is set to a number of steps: as it was set, where it was set to as many, or none is asked for.

    Raises:
        CalibrationError: it cannot be set so, or copied.
    """
    name = type(scheduler).__name__
    try:
        own = copy.deepcopy(scheduler)
    except Exception as error:
        raise CalibrationError(f"The {name} cannot be copied, so its state cannot be kept: {_why(error)}.") from error
    if steps is None or steps == steps_of(own):
        if steps_of(own) is None:
            raise CalibrationError("The scheduler has no number of steps: give steps=N, or call set_timesteps(N).")
        return _rested(own)
    try:
        own.set_timesteps(steps)
        [float(t) for t in own.timesteps]
    except Exception as error:
        advice = "" if "mu" not in str(error) else f"; call set_timesteps({steps}, mu=...) and give it as it is then"
        raise CalibrationError(f"{name} cannot be set to {steps} steps: {_why(error)}{advice}.") from error
    return own


def describe(scheduler: Any, steps: int) -> dict[str, Any]:
    """A scheduler that has been set, as JSON: see the head of this file.

    One that is no class of diffusers, or cannot be made again from what is written, has its name under `_scheduler`
    alone.
    """
    text = {**_config(scheduler), "_class_name": type(scheduler).__name__, "_steps": steps}
    if _is_of_diffusers(scheduler) and _is_json(text):
        fresh = _fresh(scheduler)
        as_usual, known = _set_somehow(fresh, steps), _held(fresh)
        own = {k: v for k, v in _held(scheduler).items() if k in vars(fresh)}
        if as_usual and _equal(_arrays(known), _arrays(own)):
            return text
        changed = {k: v for k, v in own.items() if k not in known or not _equal(v, known[k])}
        text["_state"] = {k: _plain(v, typed=True) for k, v in sorted(changed.items())}
        try:
            if _equal(_arrays(_held(rebuild(text))), _arrays(own)):
                return text
        except CalibrationError:
            pass
    return {"_scheduler": f"{type(scheduler).__module__}.{type(scheduler).__qualname__}", "_steps": steps}


def rebuild(text: Mapping[str, Any]) -> Any:
    """Inverse of `describe`, for a description that may come from a stranger.

    Raises:
        CalibrationError: diffusers has no such scheduler, or it cannot be set to what is written.
    """
    steps = text.get("_steps")
    if type(steps) is not int or not 0 < steps <= MOST_STEPS:
        raise CalibrationError(f"The schedule's sampler has no number of steps (_steps) from 1 to {MOST_STEPS}.")
    numbers = {k: abs(v) for k, v in text.items() if isinstance(v, (int, float))}
    if big := [k for k, v in numbers.items() if MOST_STEPS < v < math.inf]:
        raise CalibrationError(f"The schedule's sampler has {big[0]} above {MOST_STEPS}.")
    cls, state = scheduler_class(text["_class_name"]), text.get("_state")
    try:
        scheduler = cls.from_config({k: v for k, v in text.items() if not k.startswith("_")})
        if state is None:
            scheduler.set_timesteps(steps)
        else:
            _set_somehow(scheduler, steps)
            _restore(scheduler, state)
        [float(t) for t in scheduler.timesteps]
    except Exception as error:  # what it makes of a configuration from outside is its own affair
        raise CalibrationError(f"{cls.__name__} cannot be set to {steps} steps: {_why(error)}.") from error
    return scheduler


def cannot_sample(scheduler: Any) -> str:
    """Why a general loop cannot sample with it; empty if it can."""
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        return f"{name} has no step()"
    parameters = inspect.signature(scheduler.step).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if len(needed) > len(_STEP):
        extra = [p.name for p in needed if p.name not in _STEP]
        return f"{name}.step() needs {', '.join(extra)}, which its own pipeline alone has"
    return ""


def identity(scheduler: Any) -> str:
    """What tells one set scheduler from another: its class, with the source of one that is not of diffusers, its
    configuration, and the numbers that it holds."""
    fresh = _fresh(scheduler)
    if fresh is not None:
        _set_somehow(fresh, steps_of(scheduler) or 1)
    names = vars(scheduler if fresh is None else fresh)  # what step() adds beside tells nothing
    held = {k: _plain(v, typed=True) for k, v in sorted(_held(scheduler).items()) if k in names}
    source = ""
    if not _is_of_diffusers(scheduler):
        try:
            source = inspect.getsource(type(scheduler))
        except (OSError, TypeError):
            source = ""
    config = sorted((k, repr(v)) for k, v in _config(scheduler).items())
    return repr((type(scheduler).__module__, type(scheduler).__qualname__, source, config, held))


def _config(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was made with, without what diffusers notes of it."""
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        return {}
    return {str(k): _plain(v) for k, v in config.items() if not str(k).startswith("_")}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def scheduler_class(name: Any) -> Any:
    """A scheduler of diffusers by the name of its class; nothing else of diffusers is reached.

    Raises:
        CalibrationError: it has none of this name.
    """
    with quiet_import():
        from diffusers import schedulers
        from diffusers.schedulers.scheduling_utils import SchedulerMixin

        found = getattr(schedulers, name, None) if isinstance(name, str) and name in _scheduler_names() else None
    if packages := getattr(found, "_backends", None):  # diffusers has a stand-in for what is not installed
        raise CalibrationError(f"{name} needs {', '.join(packages)}, which must be installed for it.")
    if not isinstance(found, type) or not issubclass(found, SchedulerMixin) or not hasattr(found, "set_timesteps"):
        close = suggest(name, _scheduler_names()) if isinstance(name, str) and len(name) < 100 else ""
        raise CalibrationError(f"diffusers has no scheduler {str(name)[:100]!a}.{close}")
    return found


@functools.cache
def _scheduler_names() -> list[str]:
    """What diffusers says it has, without loading it."""
    from diffusers import schedulers

    return [name for name in dir(schedulers) if name.endswith("Scheduler")]


def _is_of_diffusers(scheduler: Any) -> bool:
    """True if it can be found again by the name of its class."""
    try:
        return scheduler_class(type(scheduler).__name__) is type(scheduler) and hasattr(scheduler, "config")
    except CalibrationError:
        return False


def _fresh(scheduler: Any) -> Any:
    """One of the same class and configuration that has not been set; None if it cannot be made."""
    try:
        return type(scheduler).from_config(_config(scheduler))
    except Exception:
        return None


def _set_somehow(scheduler: Any, steps: int) -> bool:
    """Let `set_timesteps` make the attributes that it makes; True if it took the number of steps alone."""
    try:
        scheduler.set_timesteps(steps)
    except Exception:
        try:
            scheduler.set_timesteps(steps, mu=1.0)
        except Exception:
            return False
        return False
    return True


def _rested(scheduler: Any) -> Any:
    """As it was before its first step, with arrays on the CPU: a pipeline may have used it.

    What it was set to are the arrays, truths and fractions that it holds; counters and histories come from one that is
    set anew.
    """
    fresh = _fresh(scheduler)
    if fresh is not None:
        _set_somehow(fresh, steps_of(scheduler) or 1)
        held = _held(scheduler)
        for name, value in vars(fresh).items():
            if name in vars(scheduler) and name not in held and name != "num_inference_steps":
                setattr(scheduler, name, value)
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.cpu())
    return scheduler


def _held(scheduler: Any) -> dict[str, Any]:
    """What a scheduler was set to: its own arrays, truths and fractions."""
    own = getattr(scheduler, "__dict__", {})
    return {k: v for k, v in own.items() if (isinstance(v, (bool, float)) and k not in _USED) or _is_array(v)}


def _arrays(held: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if _is_array(v)}


def _is_array(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 1 and len(value) > 0
    return type(value) in (list, tuple) and len(value) > 0 and all(type(v) in (int, float) for v in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if _is_array(a) and _is_array(b):
        one, other = torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()
        return (
            one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        )
    return type(a) is type(b) and (a == b) is True


def _plain(value: Any, typed: bool = False) -> Any:
    """As JSON; arrays with their kind and dtype, if asked for."""
    if isinstance(value, (Tensor, np.ndarray)):
        array = torch.as_tensor(value).detach().cpu()
        values = array.tolist()
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return {"kind": kind, "dtype": str(array.dtype).removeprefix("torch."), "values": values} if typed else values
    return value.item() if isinstance(value, np.generic) else value


def _restore(scheduler: Any, state: Any) -> None:
    """Attributes from `_state`: arrays, truths and fractions; nothing that the class itself defines is replaced."""
    for name, value in dict(state).items():
        if not name.isidentifier() or hasattr(type(scheduler), name) or name == "_internal_dict":
            raise ValueError(f"it has no array {name[:50]!a}")
        setattr(scheduler, name, _array(name, value))


def _array(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        dtype = getattr(torch, str(value["dtype"]), None)  # pyright: ignore[reportUnknownArgumentType]
        if not isinstance(dtype, torch.dtype) or len(value["values"]) > 10 * MOST_STEPS:  # pyright: ignore[reportUnknownArgumentType]
            raise ValueError(f"{name} is no array of numbers")
        made = torch.tensor([float(v) for v in value["values"]], dtype=torch.float64).to(dtype)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        return made if value["kind"] == "tensor" else made.numpy()
    if isinstance(value, (bool, float)) or _is_array(value):
        return value
    raise ValueError(f"{name} is no array, truth or fraction")


def _why(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")[:300]
