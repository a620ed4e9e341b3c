"""The schema of an artifact's manifest: what a file from a stranger must be before anything else of it is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError, field_validator

from tfqc.errors import ArtifactError
from tfqc.files.storage import parse_json, read_text
from tfqc.runtime import VERSION as RUNTIME

FORMAT, VERSION = "tfqc-artifact", 2
MANIFEST, PROGRAM, TIME_TENSORS = "manifest.json", "program.ir", "time.safetensors"
LONGEST = 1 << 24  # bytes of a manifest

_M = TypeVar("_M", bound=BaseModel)
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}")


def is_name(name: str) -> bool:
    """True if an artifact may have a file of this name: one in its directory, on every system."""
    return _NAME.fullmatch(name) is not None and name not in (MANIFEST, "__pycache__")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class FileEntry(_Strict):
    """A file's size and hash."""

    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]
    bytes: _Count


class Listing(BaseModel):
    """What manifests of every version have: enough to tell that a directory is ours, and which of its files."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: Annotated[str, Field(pattern=rf"\A{FORMAT}\z")]
    version: Annotated[int, Field(ge=1, lt=2**31)]
    files: dict[str, FileEntry]

    @field_validator("files", mode="before")
    @classmethod
    def _names_in_the_directory(cls, files: Any) -> Any:
        if isinstance(files, dict) and (bad := [name for name in files if not is_name(name)]):
            raise ValueError(f"{bad[0][:200]!a} is no name for a file of an artifact")
        if isinstance(files, dict) and PROGRAM not in files:
            raise ValueError(f"there is no {PROGRAM!r}")
        return files


class InputFacts(_Strict):
    """An argument of the model that was captured."""

    path: list[str]
    role: str
    type: str


class ScheduleFacts(_Strict):
    """The timesteps that were compiled for, and the sampler that visits them."""

    timesteps: list[FiniteFloat]
    sampler: dict[str, JsonValue] = {}


class CalibrationFacts(_Strict):
    """What was calibrated on."""

    images: _Count
    seed: int
    guidance: FiniteFloat


class RemarkFacts(_Strict):
    """A line of the report as data: see `tfqc.passing.remarks.Remark`."""

    pass_name: str
    kind: str
    node: str = ""
    numbers: dict[str, int | FiniteFloat | str] = {}
    number: _Count = 0


class RecipeEntry(_Strict):
    """A file that a recipe was read from: its name as it was written, and its hash."""

    name: str
    sha256: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class RecipeFacts(_Strict):
    """What was compiled from a recipe: see `tfqc.recipe.Recipe.facts`."""

    resolved: dict[str, JsonValue]
    files: list[RecipeEntry]
    settings: list[str]
    weights: Annotated[str, Field(pattern=r"\A[0-9a-f]{64}\z")]


class Manifest(Listing):
    """A manifest of this version. What a backend adds for itself is kept as it is (JSON).

    runtime: the version of `tfqc.runtime` that the artifact's own code needs. backend: whose artifact it is; None for
    one that was emitted, but not by `tfqc.compile`.
    """

    runtime: Annotated[int, Field(ge=1, lt=2**31)]
    backend: str | None = None
    target: str = ""
    pipeline: str = ""
    plan: str = ""
    model: str = ""
    inputs: list[InputFacts] = []
    schedule: ScheduleFacts | None = None
    calibration: CalibrationFacts | None = None
    seed: int = 0
    recipe: RecipeFacts | None = None
    step_policy: dict[str, JsonValue] | None = None
    report: list[str] = []
    remarks: list[RemarkFacts] = []
    versions: dict[str, str] = {}


def listed(path: Path) -> Listing:
    """A manifest of whatever version, as far as all have it in common.

    Raises:
        ArtifactError: it is none of ours.
    """
    return _validated(Listing, _read(path), path)


def read(path: Path) -> dict[str, Any]:
    """A manifest of this version; what is optional and not there has its default.

    Raises:
        ArtifactError: it is none of ours, or of an earlier or a later version.
    """
    value = _read(path)
    its = _validated(Listing, value, path)
    if its.version < VERSION:
        raise ArtifactError(f"{path.parent} was written by an earlier tfqc: compile the model again.")
    if its.version > VERSION:
        raise ArtifactError(
            f"{path.parent} has format version {its.version}, newer than {VERSION}, which this tfqc reads: "
            "upgrade tfqc."
        )
    manifest = _validated(Manifest, value, path)
    if manifest.runtime > RUNTIME:
        raise ArtifactError(
            f"{path.parent} needs version {manifest.runtime} of tfqc.runtime, this is {RUNTIME}: upgrade tfqc."
        )
    return manifest.model_dump()


def written(facts: dict[str, Any], files: dict[str, dict[str, Any]], path: Path) -> str:
    """The text of a manifest, which `read` takes.

    Raises:
        ArtifactError: the facts are no manifest's.
    """
    value = {"format": FORMAT, "version": VERSION, "runtime": RUNTIME, **facts, "files": files}
    text = json.dumps(value, indent=1, sort_keys=True) + "\n"
    _validated(Manifest, parse_json(text, str(path), ArtifactError), path)
    return text


def _read(path: Path) -> Any:
    return parse_json(read_text(path, ArtifactError, LONGEST), str(path), ArtifactError)


def _validated(schema: type[_M], value: Any, path: Path) -> _M:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(ascii(part)[1:-1] if isinstance(part, str) else str(part) for part in first["loc"][:6])
        what = first["msg"].removeprefix("Value error, ")
        raise ArtifactError(f"{path} is no manifest of a tfqc artifact: {where[:100] or 'it'}: {what}.") from None
