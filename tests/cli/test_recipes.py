"""Recipes on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Tfqc
from tfqc.recipe.schema import json_schema


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text("target: fake-quant{weights=4}\nsteps: 3\ncalibration: 2\n")
    return path


def test_compile_from_a_recipe_and_show_what_it_was(tfqc: Tfqc, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tfqc("compile", TINY, "--recipe", recipe, "--set", "target.weights=8", "--set", "seed=3", "--out", out)
    assert done.code == 0, done.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["seed"], manifest["target"]) == (3, "fake-quant")
    shown = tfqc("recipe", "show", out, "--json").json
    assert shown == manifest["recipe"]["resolved"]
    assert (shown["model"], shown["seed"], shown["steps"]) == (TINY, 3, 3)
    assert tfqc("recipe", "show", out).out.startswith(f"model: {TINY}\ntarget: fake-quant\nsteps: 3\n")
    assert "has --set" not in tfqc("recipe", "show", out, "--set", "seed=3").out
    assert tfqc("recipe", "show", out, "--set", "seed=3").code == 1


def test_show_compiles_nothing(tfqc: Tfqc, recipe: Path) -> None:
    done = tfqc("recipe", "show", recipe, "--set", "model=nowhere:nothing", "--json")
    assert done.json["model"] == "nowhere:nothing" and done.json["target"] == "fake-quant{weights=4}"


def test_the_schema_is_json(tfqc: Tfqc) -> None:
    assert tfqc("recipe", "schema").json == json_schema()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", "0"), "--seed stands beside --recipe: say it with --set seed=..., or in the recipe."),
        (("--target", "cpu-int8"), "--target stands beside --recipe"),
        (("--set", "stesp=3"), "there is no key 'stesp'. Did you mean 'steps'?"),
    ],
)
def test_what_does_not_go_together(options: tuple[str, str], said: str, tfqc: Tfqc, recipe: Path) -> None:
    done = tfqc("compile", TINY, "--recipe", recipe, *options, "--out", recipe.parent / "out")
    assert done.code == 1
    assert said in " ".join(done.err.split())
    assert not (recipe.parent / "out").exists()


def test_something_names_a_model(tfqc: Tfqc, recipe: Path) -> None:
    out = recipe.parent / "out"
    done = tfqc("compile", "--recipe", recipe, "--out", out)
    assert f"{recipe} names no model" in done.err.replace("\n", " ")
    done = tfqc("compile", "--out", out)
    assert done.code == 2 and "Give a model, or a recipe that names one." in done.err
    done = tfqc("compile", TINY, "--set", "seed=3", "--out", out)
    assert done.code == 2 and "--set changes what a recipe says" in done.err
