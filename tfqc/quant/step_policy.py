"""Protected steps: the first and the last of a schedule, at which inputs of layers stay in floating point.

Community checkpoints say so in their config.json, under `quantization_config.runtime.diffusion_step_policy` (schema
version 1: NVIDIA's Cosmos3 checkpoints, read by vLLM-Omni, SGLang, TensorRT-LLM and diffusers). It is taken as it
stands or refused: of a policy that was followed in part, nobody would see what was left out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tfqc.errors import PipelineError, SpecError, suggest
from tfqc.passing.pipeline import Pipeline
from tfqc.passing.spec import changed_options

Mode = Literal["a16", "native"]
KEY = "diffusion_step_policy"
_MODES = ("a16", "native")
_PLANNER, _OPTIONS = "plan-quantization", ("first_steps", "last_steps", "overlap", "reasoner")
# What schema version 1 leaves no choice in.
_FIXED = {
    "schema_version": 1, "type": "first_last_n", "index_space": "denoising_loop_iteration", "default_mode": "native",
}  # fmt: skip
_KEYS = (*_FIXED, "scope", "first_steps", "last_steps", "overlap", "reasoner")
# Denoisers, as pipelines of diffusers call them.
_SCOPE = ("transformer", "transformer_2", "unet", "unet_2", "unconditional_transformer", "prior")


@dataclass(frozen=True)
class StepPolicy:
    """Which steps are protected, in the words of the schema.

    first_steps, last_steps: how many, by position in the sampling loop. overlap: what holds for steps that are both.
    reasoner: `a16` leaves what waits for no step, and runs once for each image, in floating point, too. scope: the
    models of a pipeline that it is for.
    """

    first_steps: int = 0
    last_steps: int = 0
    overlap: Mode = "a16"
    reasoner: Mode = "native"
    scope: tuple[str, ...] = ("transformer",)

    def __post_init__(self) -> None:
        for name in ("first_steps", "last_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name.replace('_', '-')}={getattr(self, name)} is negative")

    def protects(self, steps: int) -> list[bool]:
        """Of each step of a schedule, whether it is protected. A schedule of one step has none that is."""
        first = [step < self.first_steps for step in range(steps)]
        last = [step >= steps - self.last_steps for step in range(steps)]
        both = self.overlap == "a16"
        return [steps > 1 and (both if a and b else a or b) for a, b in zip(first, last, strict=True)]

    @property
    def protects_nothing(self) -> bool:
        """True for a policy by which everything is as it would be without one."""
        return not self.first_steps and not self.last_steps and self.reasoner == "native"

    def to_config(self) -> dict[str, Any]:
        """The policy as JSON, every key of the schema."""
        return {
            **_FIXED,
            "scope": self.scope if isinstance(self.scope, str) else list(self.scope),  # a text is refused as it is
            "first_steps": {"count": self.first_steps, "mode": "a16"},
            "last_steps": {"count": self.last_steps, "mode": "a16"},
            "overlap": self.overlap,
            "reasoner": self.reasoner,
        }


def parts_of(marks: Sequence[bool]) -> list[tuple[int, int, bool]]:
    """Runs of equal marks: start, stop, mark."""
    found: list[tuple[int, int, bool]] = []
    for mark, run in itertools.groupby(range(len(marks)), marks.__getitem__):
        steps = list(run)
        found.append((steps[0], steps[-1] + 1, mark))
    return found


def read_policy(given: Any) -> StepPolicy:
    """A policy from its JSON.

    Raises:
        SpecError: another version, a key that is not known or not there, or a value that the schema does not have.
    """
    policy = _mapping(given, KEY, _KEYS)
    for key, value in _FIXED.items():
        if type(policy[key]) is not type(value) or policy[key] != value:
            raise SpecError(f"{KEY}.{key} is {_shown(policy[key])}, and {value!r} is what tfqc can carry out.")
    scope = policy["scope"]
    if not isinstance(scope, (list, tuple)) or not scope or not all(part in _SCOPE for part in scope):  # pyright: ignore[reportUnknownVariableType]
        raise SpecError(f"{KEY}.scope is {_shown(scope)}: a list of {', '.join(_SCOPE)}.")
    for key in ("overlap", "reasoner"):
        if policy[key] not in _MODES:
            raise SpecError(f"{KEY}.{key} is {_shown(policy[key])}: {' or '.join(_MODES)}.")
    counts = {key: _count(policy[key], f"{KEY}.{key}") for key in ("first_steps", "last_steps")}
    names = tuple(dict.fromkeys(map(str, scope)))  # pyright: ignore[reportUnknownArgumentType]
    return StepPolicy(**counts, overlap=policy["overlap"], reasoner=policy["reasoner"], scope=names)


def policy_in(config: Any) -> StepPolicy | None:
    """The policy of a `quantization_config`, or of a config.json that holds one; None where there is none.

    Raises:
        SpecError: there is one that cannot be carried out.
    """
    config = _plain(config)
    inner = _plain(config.get("quantization_config", config))
    if KEY in config or KEY in inner:
        raise SpecError(f"{KEY} stands in the wrong place: it is read under quantization_config.runtime.")
    config = inner
    if (runtime := config.get("runtime")) is None:
        return None
    if not isinstance(runtime, Mapping) or set(runtime) - {KEY}:  # pyright: ignore[reportUnknownArgumentType]
        raise SpecError(f"quantization_config.runtime is {_shown(runtime)}, of which tfqc knows {KEY} alone.")
    return None if runtime.get(KEY) is None else read_policy(runtime[KEY])  # pyright: ignore[reportUnknownArgumentType]


def with_policy(passes: Pipeline, policy: StepPolicy) -> Pipeline:
    """A pipeline whose plan protects these steps, and none but these.

    Raises:
        PipelineError: no pass of it plans.
    """
    if not policy.protects_nothing and not any(item.name == _PLANNER for item in passes.passes):
        raise PipelineError(f"No pass of the pipeline protects steps: put {_PLANNER} behind discover-tib.")
    options = {name: getattr(policy, name) for name in _OPTIONS}
    return Pipeline(
        tuple(dataclasses.replace(i, **options) if i.name == _PLANNER else i for i in passes.passes)  # pyright: ignore[reportArgumentType]
    )


def policy_of(passes: Pipeline, scope: tuple[str, ...] = ("transformer",)) -> StepPolicy | None:
    """What a pipeline's plan protects, the last where several plan; None where nothing is."""
    found = None
    for item in passes.passes:
        its: dict[str, Any] = changed_options(item) if item.name == _PLANNER else {}  # pyright: ignore[reportArgumentType]
        options = {name: its[name.replace("_", "-")] for name in _OPTIONS if name.replace("_", "-") in its}
        found = StepPolicy(**options, scope=scope) if options else found
    return found


def _mapping(given: Any, what: str, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise SpecError(f"{what} is {_shown(given)}, which is no mapping of {', '.join(keys)}.")
    if strange := [str(key) for key in given if key not in keys]:  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        raise SpecError(
            f"{what} has a key {strange[0][:80]!r}, which tfqc does not know.{suggest(strange[0], list(keys))}"
        )
    if lacking := [key for key in keys if key not in given]:
        raise SpecError(f"{what} does not say {lacking[0]!r}: every key is needed.")
    return given  # pyright: ignore[reportUnknownVariableType]


def _plain(config: Any) -> Mapping[str, Any]:
    config = config.to_dict() if hasattr(config, "to_dict") and not isinstance(config, type) else config
    return config if isinstance(config, Mapping) else {}  # pyright: ignore[reportUnknownVariableType]


def _count(given: Any, what: str) -> int:
    window = _mapping(given, what, ("count", "mode"))
    count = window["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise SpecError(f"{what}.count is {_shown(count)}: a whole number from 0.")
    if window["mode"] != "a16":
        raise SpecError(f"{what}.mode is {_shown(window['mode'])}, and 'a16' is what tfqc can carry out.")
    return count


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
