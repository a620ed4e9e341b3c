"""From files and settings to one set of keys: `extends` followed, settings put on top, each key's origin known."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tfqc.errors import RecipeError, SpecError, suggest
from tfqc.files.storage import read_text
from tfqc.files.yaml_text import YamlText, parse_yaml
from tfqc.passing.spec import kebab, parse_specs
from tfqc.recipe.schema import RecipeFile, allowed

_LONGEST, _DEEPEST = 1 << 20, 16  # bytes of a file, and files that extend each other
_NAMED = ("target", "scheduler")  # of which a file may change one option
_SETTING = re.compile(r"([A-Za-z_][\w\-]*)(?:\.([A-Za-z_][\w\-]*))?=(.*)", re.DOTALL)

Values = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Origin:
    """Who says a key: the sentence's beginning, and the directory that paths are relative to (None: the caller's)."""

    where: str
    directory: Path | None = None


@dataclass
class Layer:
    """What one file, or the settings, say."""

    values: Values = field(default_factory=dict[str, Any])
    origins: dict[str, Origin] = field(default_factory=dict[str, Origin])

    def over(self, base: Layer) -> Layer:
        """This on top of `base`: keys replace keys, options of a target or scheduler without a name are added."""
        values, origins = dict(base.values), {**base.origins, **self.origins}
        for key, value in self.values.items():
            below = values.get(key)
            if key in _NAMED and isinstance(value, dict) and "name" not in value and isinstance(below, dict):
                value = {**below, **value}
            values[key] = value
        return Layer(values, origins)


def read_file(path: Path, files: list[tuple[str, str]], above: tuple[Path, ...] = (), name: str = "") -> Layer:
    """A recipe's file and those that it extends; of each its name as written and its hash go to `files`.

    Raises:
        RecipeError: a file is not there, no recipe, or extends itself.
    """
    text = read_text(path, RecipeError, _LONGEST)
    where = str(path)
    files.append((name or path.name, hashlib.sha256(text.encode()).hexdigest()))
    read = parse_yaml(text, where, RecipeError)
    values = _checked_keys(read, where)
    layer = _layer(values, {k: Origin(f"{where}, line {read.lines[(k,)]}", path.parent) for k in values})
    base = layer.values.pop("extends", None)
    if base is None:
        return layer
    here = layer.origins["extends"].where
    if not isinstance(base, str) or not base or Path(base).is_absolute():
        raise RecipeError(f"{here}: extends is {shown(base)}; it is {allowed('extends')}.")
    above = (*above, path.resolve())
    try:
        its_path = (path.parent / base).resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a NUL, or links in a circle
        raise RecipeError(f"{here}: extends {shown(base)}, which is no path: {error}.") from error
    if its_path in above:
        raise RecipeError(f"{here}: extends {base!r}, which extends this file in turn: end the circle.")
    if len(above) >= _DEEPEST:
        raise RecipeError(f"{here}: extends {base!r}, the {_DEEPEST + 1}th file in a row: put some of them together.")
    if not its_path.is_file():
        raise RecipeError(f"{here}: extends {base!r}, and there is no file {path.parent / base}.")
    return layer.over(read_file(path.parent / base, files, above, base))


def read_settings(settings: Sequence[str]) -> Layer:
    """What `key=value` and `target.option=value` say; a value is YAML, so `3` is a number and `"3"` is text.

    Raises:
        RecipeError: a setting of another form, or of a key that recipes do not have.
    """
    found = Layer()
    for text in settings:
        match = _SETTING.fullmatch(text)
        if match is None:
            raise RecipeError(f"The setting {shown(text)} is not of the form key=value, such as steps=30.")
        key, option, value = match.groups()
        where = f"The setting {shown(text)}"
        if option is not None and key not in _NAMED:
            raise RecipeError(f"{where}: {key} has no parts; {' and '.join(_NAMED)} have.")
        read = parse_yaml(value, where, RecipeError).value
        values = {key: {option: read}} if option is not None else {key: read}
        if key == "extends":
            raise RecipeError(f"{where}: a file extends another, a setting does not: {_known()}.")
        _checked_keys(YamlText(values), where)
        found = _layer(values, {key: Origin(where)}).over(found)
    return found


def validated(schema: type[M], layer: Layer) -> M:
    """The keys as a recipe's schema has them.

    Raises:
        RecipeError: a value of another kind: where it stands, and what is allowed.
    """
    try:
        return schema.model_validate(layer.values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = str(first["loc"][0])
        value = layer.values.get(key)
        raise RecipeError(f"{layer.origins[key].where}: {key} is {shown(value)}; it is {allowed(key)}.") from None


def shown(value: Any) -> str:
    """A value in a sentence."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _checked_keys(read: YamlText, where: str) -> Values:
    if read.value is None:
        return {}
    if not isinstance(read.value, dict):
        raise RecipeError(f"{where} is no recipe: it is {shown(read.value)}, and a recipe is a mapping; {_known()}.")
    known = list(RecipeFile.model_fields)
    for key in read.value:
        if key not in known:
            line = f", line {read.lines[(key,)]}" if (key,) in read.lines else ""
            close = suggest(key, known)
            close = "" if close.startswith(" Known") else close
            raise RecipeError(f"{where}{line}: there is no key {key[:60]!a}.{close} {_known()}.")
    return read.value


def _known() -> str:
    return f"Recipes have {', '.join(RecipeFile.model_fields)}"


def _layer(values: Values, origins: dict[str, Origin]) -> Layer:
    """With targets and schedulers in parts, so that others may change one."""
    found = dict(values)
    target, scheduler = found.get("target"), found.get("scheduler")
    if isinstance(target, str):
        found["target"] = _parts(target, origins["target"].where)
    elif isinstance(target, dict):
        found["target"] = {kebab(str(k)): v for k, v in target.items()}
    if isinstance(scheduler, str):
        found["scheduler"] = {"name": scheduler}
    return Layer(found, origins)


def _parts(text: str, where: str) -> Values:
    try:
        specs = parse_specs(text)
    except SpecError as error:
        raise RecipeError(f"{where}: target: {error}", *error.notes) from error
    if len(specs) != 1:
        raise RecipeError(f"{where}: target is {shown(text)}; it is {allowed('target')}.")
    return {"name": specs[0].name, **{k: list(v) if len(v) != 1 else v[0] for k, v in specs[0].options.items()}}
