"""`tfqc recipe`: what a recipe may say, and what one says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfqc.cli import options
from tfqc.cli.output import guarded, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tfqc.recipe import Recipe

# What `tfqc compile` is told either by options or by a recipe.
_SAID = (
    "target", "pipeline", "strategy", "plan", "step_policy", "steps", "schedule", "dynamic", "calibration_images",
    "calibration", "seed", "require_real",
)  # fmt: skip
app = typer.Typer(name="recipe", help="Recipes: files that say all that `tfqc compile` is given.", no_args_is_help=True)


@app.command()
@guarded
def schema() -> None:
    """Print the JSON schema of recipes, for editors and other programs."""
    import json

    from tfqc.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=1))


@app.command("show")
@guarded
def show_recipe(
    recipe: Annotated[Path, typer.Argument(help="A recipe's file, or an artifact that was compiled from one.")],
    settings: options.Settings = None,
    as_json: options.AsJson = False,
) -> None:
    """Print what a recipe resolves to: files that it extends, settings and defaults put in. Nothing is compiled."""
    from tfqc.cli.subjects import is_artifact
    from tfqc.errors import RecipeError
    from tfqc.recipe.recipe import Recipe, as_yaml, recipe_of

    if is_artifact(str(recipe)):
        if settings:
            raise RecipeError(f"{recipe} is an artifact, whose recipe is what it is: give --set with a recipe's file.")
        resolved = recipe_of(recipe)
    else:
        resolved = Recipe.load(recipe, settings or ()).resolved
    show(resolved, as_yaml(resolved).rstrip("\n"), as_json)


def read(recipe: Path, model: str | None, settings: Sequence[str], context: typer.Context) -> Recipe:
    """The recipe that `tfqc compile` is given, with a model.

    Raises:
        RecipeError: it is none, names no model, or an option says what the recipe is to say.
    """
    import json

    from tfqc.errors import RecipeError
    from tfqc.recipe import Recipe

    for name in _SAID:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{option} stands beside --recipe: say it with --set {name}=..., or in the recipe.")
    found = Recipe.load(recipe, [*settings, *([] if model is None else [f"model={json.dumps(model)}"])])
    if "model" not in found:
        raise RecipeError(f"{recipe} names no model: say model in it, or tfqc compile MODEL --recipe {recipe}.")
    return found
