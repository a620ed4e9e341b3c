"""From keys to arguments of `tfqc.compile`: every name in them looked up, every file read, before anything is made."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tfqc.codegen.recipes import STRATEGIES
from tfqc.codegen.target import Target
from tfqc.errors import RecipeError, TfqcError, suggest
from tfqc.files.storage import file_hash
from tfqc.frontend.dynamic import read_dynamic
from tfqc.models.find import builtin_names
from tfqc.passing.pipeline import Pipeline
from tfqc.quant.plan_text import read_plan
from tfqc.quant.step_policy import read_policy
from tfqc.recipe.reading import Layer, shown, validated
from tfqc.recipe.schema import NamedTarget, RecipeFile, Times, allowed
from tfqc.sampling.calls import load_calibration
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import rebuild, scheduler_class

_INSTEAD = {"strategy": "pipeline", "steps": "schedule", "scheduler": "schedule"}  # one of each pair
_DEFAULTS = {"calibration": 16, "strategy": "fold"}


@dataclass
class Checked:
    """Arguments of `tfqc.compile`; what was resolved, as JSON; files that were read beside recipes (name, SHA-256)."""

    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    resolved: dict[str, Any] = field(default_factory=dict[str, Any])
    files: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, key: str, value: Any, argument: Any = None) -> None:
        """A key's value, and the argument that it stands for where that is not the same."""
        self.resolved[key] = value
        self.arguments[key] = value if argument is None else argument


def checked(layer: Layer) -> Checked:
    """What a recipe's keys stand for.

    Raises:
        RecipeError: where a key stands, what is wrong with it, what is allowed.
    """
    layer = Layer({key: value for key, value in layer.values.items() if value is not None}, layer.origins)
    its, found = validated(RecipeFile, layer), Checked()
    for key, other in _INSTEAD.items():
        if key in layer.values and other in layer.values:
            where = layer.origins[other].where
            raise RecipeError(
                f"{layer.origins[key].where}: {key} stands beside {other} ({where}): set one of them to null."
            )
    if its.model is not None:
        _model(its.model, layer, found)
    with _said(layer, "target"):
        found.add("target", str(_target(its.target)))
    _schedule(its, layer, found)
    with _said(layer, "strategy"):
        if its.strategy is not None and its.strategy not in STRATEGIES:
            raise RecipeError(f"There is no strategy {shown(its.strategy)}.{suggest(its.strategy, list(STRATEGIES))}")
    with _said(layer, "pipeline"):
        if its.pipeline is None:
            found.add("strategy", its.strategy or _DEFAULTS["strategy"])
        else:
            text = its.pipeline if isinstance(its.pipeline, str) else yaml.safe_dump(its.pipeline)
            found.add("pipeline", str(Pipeline.parse(text)))
    if its.plan is not None:
        text = its.plan if isinstance(its.plan, str) else "".join(f"{line}\n" for line in its.plan)
        with _said(layer, "plan"):
            read_plan(text)
        found.add("plan", text)
    if its.step_policy is not None:
        with _said(layer, "step_policy"):
            found.add("step_policy", read_policy(its.step_policy).to_config())
    _calibration(its.calibration, layer, found)
    found.add("seed", its.seed)
    if its.dynamic is not None:
        with _said(layer, "dynamic"):
            read_dynamic(its.dynamic)
        found.add("dynamic", its.dynamic)
    found.add("require_real", its.require_real)
    return found


@contextmanager
def _said(layer: Layer, key: str) -> Generator[None]:
    """Begin the sentences of what is refused here with the place of the key."""
    try:
        yield
    except TfqcError as error:
        where = layer.origins[key].where if key in layer.origins else "The recipe"
        raise RecipeError(f"{where}: {key}: {error}", *error.notes) from error


def _target(given: str | NamedTarget) -> Target:
    if isinstance(given, str):
        return Target.parse(given)
    options = given.model_extra or {}
    return Target.parse(yaml.safe_dump([{given.name: options} if options else given.name]))


def _model(name: str, layer: Layer, found: Checked) -> None:
    origin = layer.origins["model"]
    if origin.directory is None or name in builtin_names():
        return found.add("model", name)
    try:
        folder = (origin.directory / name).is_dir()
    except (OSError, ValueError):  # too long, or a NUL
        folder = False
    if folder:
        return found.add("model", name, str(origin.directory / name))
    if ":" in name:
        raise RecipeError(
            f"{origin.where}: model is {shown(name)}, which is code that a file does not get to run: give it yourself, "
            f"as `tfqc compile {name} --recipe ...`, or as the setting model={name}."
        )
    raise RecipeError(
        f"{origin.where}: model is {shown(name)}, and there is no folder {origin.directory / name}; it is "
        f"{allowed('model')}. Built-in: {', '.join(builtin_names())}."
    )


def _schedule(its: RecipeFile, layer: Layer, found: Checked) -> None:
    if its.schedule is not None:
        times = its.schedule if isinstance(its.schedule, Times) else Times(timesteps=its.schedule)
        text = times.model_dump_json()
        with _said(layer, "schedule"):
            schedule = SamplingSchedule.from_json(text, "It")
            if not schedule.cannot_sample:
                schedule.scheduler()  # what it cannot be set to is said before the time is spent
        return found.add("schedule", times.model_dump() if times.sampler else times.timesteps, schedule)
    if its.steps is not None:
        found.add("steps", its.steps)
    if its.scheduler is None:
        return None
    config = {} if isinstance(its.scheduler, str) else its.scheduler.model_extra or {}
    name = its.scheduler if isinstance(its.scheduler, str) else its.scheduler.name
    with _said(layer, "scheduler"):
        if its.steps is None:
            raise RecipeError("It needs a number of steps: say steps, too.")
        known = [k for k in inspect.signature(scheduler_class(name).__init__).parameters if k not in ("self", "kwargs")]
        if strange := [key for key in config if key not in known]:
            raise RecipeError(f"{name} has no configuration {shown(strange[0])}.{suggest(strange[0], known)}")
        schedule = SamplingSchedule.of(rebuild({**config, "_class_name": name, "_steps": its.steps}))
    found.resolved["scheduler"] = {"name": name, **config}
    found.arguments["schedule"] = schedule
    return None


def _calibration(given: int | str | None, layer: Layer, found: Checked) -> None:
    if not isinstance(given, str):
        return found.add("calibration", given or _DEFAULTS["calibration"])
    path = (layer.origins["calibration"].directory or Path()) / given
    with _said(layer, "calibration"):
        data = load_calibration(path)
        found.files.append((given, file_hash(path)))
    return found.add("calibration", given, data)
