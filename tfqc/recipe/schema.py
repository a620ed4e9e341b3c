"""What a recipe may say: one key for each thing that `tfqc.compile` is given as data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue

from tfqc.codegen.recipes import STRATEGIES

Scalar = bool | int | FiniteFloat | str | None
Name = Annotated[str, Field(min_length=1, max_length=4096)]
Text = Annotated[str, Field(min_length=1)]
MOST_STEPS = 10_000


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class NamedTarget(BaseModel):
    """A target in parts: the backend's name, and its options."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Scalar | list[Scalar]] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    name: Name


class NamedScheduler(BaseModel):
    """A scheduler of diffusers in parts: the class's name, and its configuration."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]

    name: Name


class Times(_Strict):
    """A schedule as `SamplingSchedule.to_json` writes it."""

    timesteps: list[FiniteFloat] = Field(min_length=1, max_length=MOST_STEPS)
    sampler: dict[str, JsonValue] = {}


class RecipeFile(_Strict):
    """A recipe of tfqc. A key that is null is as if it were not there, also where `extends` says it."""

    extends: Name | None = Field(
        None, description="the path of a recipe, relative to this one, whose keys hold where this one has none"
    )
    model: Name | None = Field(
        None,
        description="a built-in name or a diffusers folder, relative to this file; package.module:factory, which is "
        "code, is given on the command line",
    )
    target: Text | NamedTarget = Field(
        "fake-quant",
        description="a target, such as 'fake-quant{weights=4}', or the same in parts: name, and the backend's options",
    )
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = Field(
        None, description=f"steps of the sampler, a whole number from 1 to {MOST_STEPS}"
    )
    scheduler: Name | NamedScheduler | None = Field(
        None,
        description="a scheduler of diffusers by the name of its class, or in parts: name, and its configuration; the "
        "model's own if nothing is said",
    )
    schedule: Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_STEPS)] | Times | None = Field(
        None, description="a list of timesteps, or {timesteps, sampler}; in place of steps and scheduler"
    )
    strategy: Name | None = Field(
        None, description=f"how temporal features are kept: {', '.join(STRATEGIES)}; fold if nothing is said"
    )
    pipeline: Text | Annotated[list[Any], Field(min_length=1)] | None = Field(
        None, description="passes, as text or as a list of names and of `name: {option: value}`; in place of strategy"
    )
    plan: Text | Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="lines of a plan, as text or as a list: `conv_in weight -> int8{per=channel}`"
    )
    step_policy: dict[str, JsonValue] | None = Field(
        None, description="steps that are protected, as a diffusion_step_policy of schema version 1 has them"
    )
    calibration: Annotated[int, Field(ge=1, lt=2**31)] | Name | None = Field(
        None,
        description="a number of images to draw, or the path of a file that Calibration.save wrote, relative to this "
        "one; 16 if nothing is said",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of everything that is drawn, a whole number from 0"
    )
    dynamic: Text | None = Field(
        None, description="dimensions that may differ from call to call: H,W or H:32..128,W or hidden_states[1]=S"
    )
    require_real: bool = Field(
        False, description="true or false: refuse products with weights that the target would not run on its kernels"
    )


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a recipe's file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RecipeFile.model_json_schema()}


def allowed(key: str) -> str:
    """What may stand behind a key: the end of a sentence."""
    return RecipeFile.model_fields[key].description or ""
