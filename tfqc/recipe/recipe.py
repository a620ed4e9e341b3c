"""A recipe as the arguments of `tfqc.compile`, and as what an artifact keeps of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from tfqc.codegen.artifact import MANIFEST, read_manifest
from tfqc.errors import RecipeError
from tfqc.recipe.checking import Checked, checked
from tfqc.recipe.reading import read_file, read_settings, shown
from tfqc.recipe.schema import RecipeFile

# Of arguments that a recipe need not say: what stands for nothing. The model and its schedule may come from elsewhere.
_UNSAID: dict[str, Any] = {"steps": None, "pipeline": None, "plan": None, "step_policy": None, "dynamic": None}


class Recipe(Mapping[str, Any]):
    """What `tfqc.compile` is given, by the names of its arguments: `tfqc.compile(**tfqc.Recipe.load("sd.yaml"))`.

    The argument `recipe` is the recipe itself, which the artifact's manifest keeps.
    """

    def __init__(self, found: Checked, files: Sequence[tuple[str, str]], settings: Sequence[str]) -> None:
        self._found, self._files, self._settings = found, tuple(files), tuple(settings)

    @classmethod
    def load(cls, path: str | Path, settings: Sequence[str] = ()) -> Recipe:
        """Read a file, and those that it extends.

        Args:
            settings: `key=value` or `target.option=value`, on top of what the file says; the value is YAML.

        Raises:
            RecipeError: which file, line and key, what is wrong, and what is allowed.
        """
        if isinstance(settings, str):
            raise RecipeError(f"settings={shown(settings)} is text: give a list of key=value.")
        files: list[tuple[str, str]] = []
        found = checked(read_settings(settings).over(read_file(Path(path), files)))
        return cls(found, [*files, *found.files], settings)

    @property
    def resolved(self) -> dict[str, Any]:
        """All that it says, with what files, settings and defaults give; JSON."""
        return dict(self._found.resolved)

    def to_yaml(self) -> str:
        """What it resolves to, as a recipe."""
        return as_yaml(self.resolved)

    def facts(self, weights: str) -> dict[str, Any]:
        """For the manifest: what it resolves to, the files that said so with their SHA-256, settings, and the
        SHA-256 of the model's weights."""
        files = [{"name": name, "sha256": digest} for name, digest in self._files]
        return {"resolved": self.resolved, "files": files, "settings": list(self._settings), "weights": weights}

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return {**self._found.arguments, "recipe": self}

    def __getitem__(self, key: str) -> Any:
        return self._arguments[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arguments)

    def __len__(self) -> int:
        return len(self._arguments)

    def __repr__(self) -> str:
        return f"<recipe: {', '.join(f'{k}={shown(v)}' for k, v in self.resolved.items())}>"


def check_recipe(recipe: Any, **given: Any) -> None:
    """Refuse arguments of `tfqc.compile` that say other than the recipe: what an artifact keeps is how it was made.

    Raises:
        RecipeError: which of them, or that `recipe` is none.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe={shown(recipe)} is no recipe: give tfqc.Recipe.load(file).")
    for name, other in given.items():
        own = recipe.get(name, _UNSAID.get(name, other))
        if name == "model" and not isinstance(other, str):
            continue  # what it names, found already
        if own is other or (isinstance(own, (str, int)) and type(own) is type(other) and own == other):
            continue
        says = f"what the recipe says, {shown(own)}" if name in recipe else "in the recipe"
        raise RecipeError(f"{name}={shown(other)} is not {says}: give Recipe.load the setting '{name}=...'.")


def recipe_of(artifact: str | Path) -> dict[str, Any]:
    """What the recipe of a saved artifact resolved to.

    Raises:
        ArtifactError: it is no artifact.
        RecipeError: it was not compiled from a recipe.
    """
    kept = read_manifest(artifact)["recipe"]
    if kept is None:
        raise RecipeError(f"{Path(artifact) / MANIFEST} has no recipe: the artifact was compiled without one.")
    return kept["resolved"]


def as_yaml(resolved: Mapping[str, Any]) -> str:
    """What a recipe resolves to, as text that `Recipe.load` takes."""
    ordered = {key: resolved[key] for key in RecipeFile.model_fields if key in resolved}
    return yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block."""


def _represent(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent)
_Dumper.ignore_aliases = lambda self, data: True
