"""Recipes: read strictly, resolved, given to `compile`, kept in the artifact; the same twice gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tfqc
from tests.cli.factories import tiny
from tfqc.errors import RecipeError
from tfqc.files.storage import tensors_hash
from tfqc.quant.step_policy import StepPolicy
from tfqc.recipe.recipe import recipe_of
from tfqc.recipe.schema import RecipeFile, json_schema

TINY = 'model="tests.cli.factories:tiny"'
FULL = {
    "model": "fashion-unet",
    "target": "fake-quant{weights=4}",
    "steps": 3,
    "scheduler": {"name": "DDIMScheduler", "beta_schedule": "scaled_linear"},
    "pipeline": "normalize,discover-tib,plan-quantization{weights=4},select-maintenance,fold-cache",
    "plan": "by Ann\nconv_in weight -> float\n",
    "step_policy": StepPolicy(1, 2).to_config(),
    "calibration": 2,
    "seed": 7,
    "dynamic": "H,W",
    "require_real": False,
}


def write(directory: Path, name: str = "r.yaml", **values: Any) -> Path:
    (directory / name).write_text(yaml.safe_dump(values, sort_keys=False))
    return directory / name


def refused(path: Path, *settings: str) -> str:
    with pytest.raises(RecipeError) as error:
        tfqc.Recipe.load(path, settings)
    return str(error.value)


def test_all_keys_are_read_and_resolved(tmp_path: Path) -> None:
    recipe = tfqc.Recipe.load(write(tmp_path, **FULL))
    assert recipe.resolved == FULL
    assert set(FULL) | {"extends", "strategy", "schedule"} == set(RecipeFile.model_fields)
    assert {k: v for k, v in recipe.items() if k not in ("recipe", "schedule")} == {
        k: v for k, v in FULL.items() if k != "scheduler"
    }
    assert recipe["schedule"].sampler["beta_schedule"] == "scaled_linear" and len(recipe["schedule"]) == 3
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert tfqc.Recipe.load(tmp_path / "again.yaml").resolved == FULL
    assert "plan: |\n  by Ann\n" in recipe.to_yaml()


def test_a_step_policy_is_read_strictly(tmp_path: Path) -> None:
    wrong = {**StepPolicy(1).to_config(), "schema_version": 2}
    message = refused(write(tmp_path, step_policy=wrong))
    assert "r.yaml, line 1: step_policy: diffusion_step_policy.schema_version is 2" in message, message


def test_defaults_are_those_of_compile(tmp_path: Path) -> None:
    resolved = tfqc.Recipe.load(write(tmp_path)).resolved
    assert resolved == {
        "target": "fake-quant", "strategy": "fold", "calibration": 16, "seed": 0, "require_real": False
    }  # fmt: skip


def test_other_ways_to_say_the_same(tmp_path: Path) -> None:
    passes = [{"normalize": {}}, "discover-tib", {"select-maintenance": {"strategy": "table"}}, "fold-cache"]
    recipe = tfqc.Recipe.load(
        write(tmp_path, target={"name": "fake-quant", "weights": 4, "activations": None}, pipeline=passes,
              plan=["by Ann", "conv_in weight -> float"], schedule=[900, 500.5, 1])
    )  # fmt: skip
    assert recipe["target"] == "fake-quant{weights=4 activations=none}"
    assert recipe["pipeline"] == "normalize,discover-tib,select-maintenance{strategy=table},fold-cache"
    assert recipe["plan"] == FULL["plan"]
    assert recipe["schedule"].timesteps == (900, 500.5, 1)
    schedule = json.loads(tfqc.SamplingSchedule.of(tiny().scheduler, 4).to_json())
    again = tfqc.Recipe.load(write(tmp_path, schedule=schedule))
    assert json.loads(again["schedule"].to_json()) == schedule == again.resolved["schedule"]


def test_extending(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases", "root.yaml", target={"name": "fake-quant", "weights": 4, "group": 2}, seed=1, steps=3)
    write(tmp_path / "bases", "mid.yaml", extends="root.yaml", target={"weights": 8, "activations": 4}, seed=2)
    leaf = write(tmp_path, extends="bases/mid.yaml", steps=None)
    recipe = tfqc.Recipe.load(leaf)
    assert recipe["target"] == "fake-quant{activations=4 group=2}"
    assert recipe["seed"] == 2 and "steps" not in recipe
    assert [f["name"] for f in recipe.facts("0")["files"]] == ["r.yaml", "bases/mid.yaml", "root.yaml"]
    digest = hashlib.sha256((tmp_path / "bases" / "root.yaml").read_bytes()).hexdigest()
    assert recipe.facts("0")["files"][2]["sha256"] == digest
    # A target with a name is another one: nothing of the base's stays.
    other = write(tmp_path, "other.yaml", extends="bases/mid.yaml", target={"name": "cpu-int8"})
    assert tfqc.Recipe.load(other)["target"] == "cpu-int8"


def test_settings_are_typed_and_come_last(tmp_path: Path) -> None:
    path = write(tmp_path, **FULL)
    recipe = tfqc.Recipe.load(
        path, ["target.weights=2", "target.group_scope=linear", "seed=3", "seed=4", "target.activations=none",
               "scheduler.beta_end=0.01", "pipeline=null", "strategy=tib", "target={name: fake-quant, edges: 4}",
               "target.weights=6"],
    )  # fmt: skip
    assert recipe["target"] == "fake-quant{weights=6 edges=4}"
    assert (recipe["seed"], recipe["strategy"]) == (4, "tib") and "pipeline" not in recipe
    assert recipe["schedule"].sampler["beta_end"] == 0.01
    assert "seed is '3'; it is of everything that is drawn" in refused(path, 'seed="3"')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nstesp: 3", "r.yaml, line 2: there is no key 'stesp'. Did you mean 'steps'? Recipes have extends, "),
        ("steps: 3\n\nsteps: 4", "r.yaml, line 3 has the key 'steps' a second time."),
        ("steps: thirty", "line 1: steps is 'thirty'; it is steps of the sampler, a whole number from 1 to 10000."),
        ("steps: true", "line 1: steps is True; it is"),
        ("steps: 0", "line 1: steps is 0; it is"),
        ("steps: 3.0", "line 1: steps is 3.0; it is"),
        ("seed: -1", "line 1: seed is -1; it is"),
        ("require_real: yes", "line 1: require_real is 'yes'; it is true or false"),
        ("model: 3", "line 1: model is 3; it is a built-in name"),
        ("\ntarget: fake-quant{wieghts=4}", "line 2: target: Target 'fake-quant' has no option 'wieghts'. Did you"),
        ("target: {name: fake-quant, weights: 40}", "line 1: target: Target 'fake-quant': weights=40 is out of range"),
        ("target: {weights: 4}", "line 1: target is {'weights': 4}; it is a target, such as"),
        ("target: {name: fake-quant, weights: {a: 1}}", "line 1: target is {"),
        ("target: nothing-here", "line 1: target: There is no backend 'nothing-here'."),
        ("target: 'fake-quant,cpu-int8'", "line 1: target is 'fake-quant,cpu-int8'; it is a target"),
        ("strategy: flod", "line 1: strategy: There is no strategy 'flod'. Did you mean 'fold'?"),
        ("pipeline: normalise", "line 1: pipeline: There is no pass 'normalise'. Did you mean 'normalize'?"),
        ("pipeline: [3]", "line 1: pipeline: In YAML an item is a name"),
        ("seed: 0\nstrategy: fold\npipeline: normalize", "r.yaml, line 2: strategy stands beside pipeline ("),
        ("steps: 3\nschedule: [3]", "r.yaml, line 1: steps stands beside schedule ("),
        ("schedule: []", "line 1: schedule is []; it is a list of timesteps"),
        ("schedule: [1, x]", "line 1: schedule is [1, 'x']; it is a list of timesteps"),
        ("schedule: {timesteps: [1], sampler: {_class_name: os}}", "line 1: schedule: diffusers has no scheduler 'os'"),
        ("scheduler: DDIMScheduler", "line 1: scheduler: It needs a number of steps"),
        ("steps: 3\nscheduler: DDIMSchedule", "line 2: scheduler: diffusers has no scheduler 'DDIMSchedule'. Did you"),
        ("steps: 3\nscheduler: {name: DDIMScheduler, beta_stop: 1}", "line 2: scheduler: DDIMScheduler has no config"),
        ("steps: 3\nscheduler: {name: DDIMScheduler, num_train_timesteps: 1000000000000}", "num_train_timesteps above"),
        ("plan: conv_in weight > int8", "line 1: plan: Line 1 of the plan: Expected '->'"),
        ("calibration: nowhere.safetensors", "line 1: calibration: "),
        ("calibration: 0", "line 1: calibration is 0; it is a number of images"),
        ("dynamic: h", "line 1: dynamic: 'h' is no"),
        ("extends: /etc/base.yaml", "line 1: extends is '/etc/base.yaml'; it is the path of a recipe, relative"),
        ("extends: [a, b]", "line 1: extends is ['a', 'b']; it is"),
        ("extends: nowhere.yaml", "line 1: extends 'nowhere.yaml', and there is no file"),
        ("extends: r.yaml", "line 1: extends 'r.yaml', which extends this file in turn"),
        ("model: nowhere", "line 1: model is 'nowhere', and there is no folder"),
        ("model: os:abort", "line 1: model is 'os:abort', which is code that a file does not get to run"),
        ("- a", "r.yaml is no recipe: it is ['a'], and a recipe is a mapping; Recipes have extends"),
        ("a: &x 1", "r.yaml, line 1 has an anchor"),
        ("\x00", "r.yaml is no YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    assert said in refused(tmp_path / "r.yaml")


def test_a_circle_over_several_files_and_through_a_link(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", extends="b.yaml")
    write(tmp_path, "b.yaml", extends="c.yaml")
    os.symlink("a.yaml", tmp_path / "c.yaml")
    assert "b.yaml, line 1: extends 'c.yaml', which extends this file in turn" in refused(tmp_path / "a.yaml")
    for i in range(20):
        write(tmp_path, f"{i}.yaml", extends=f"{i + 1}.yaml")
    assert "the 17th file in a row" in refused(tmp_path / "0.yaml")


def test_an_error_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", seed=0, steps="x")
    assert f"{tmp_path}/base.yaml, line 2: steps is 'x'" in refused(write(tmp_path, extends="base.yaml"))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("steps", "The setting 'steps' is not of the form key=value"),
        ("stesp=3", "The setting 'stesp=3': there is no key 'stesp'. Did you mean 'steps'?"),
        ("steps=x", "The setting 'steps=x': steps is 'x'; it is"),
        ("plan.conv_in=3", "The setting 'plan.conv_in=3': plan has no parts; target and scheduler have."),
        ("extends=b.yaml", "a file extends another, a setting does not"),
        ("steps=[", "The setting 'steps=[', line 1 is no YAML"),
        ("target.nothing=3", "The setting 'target.nothing=3': target: Target 'fake-quant' has no option 'nothing'."),
    ],
)
def test_a_wrong_setting(setting: str, said: str, tmp_path: Path) -> None:
    assert said in refused(write(tmp_path, target="fake-quant"), setting)


def test_files_that_are_none(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "nowhere.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is no file" in refused(tmp_path / "pipe.yaml")
    (tmp_path / "long.yaml").write_text("#" * (1 << 21))
    assert "has more than" in refused(tmp_path / "long.yaml")
    with pytest.raises(RecipeError, match="is text: give a list"):
        tfqc.Recipe.load(write(tmp_path), "seed=3")


def test_the_same_recipe_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny().calibration(2, seed=5).save(tmp_path / "data.safetensors")
    write(tmp_path, "base.yaml", target="fake-quant{weights=4}", calibration="data.safetensors", seed=3)
    path = write(tmp_path, extends="base.yaml", steps=3, plan=["conv_out weight -> float"])
    made = [tfqc.compile(**tfqc.Recipe.load(path, [TINY])) for _ in range(2)]
    files = [artifact.files() for artifact in made]
    assert files[0] == files[1]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in ("base.yaml", "r.yaml", "data.safetensors"):
        (moved / file).write_bytes((tmp_path / file).read_bytes())
    assert tfqc.compile(**tfqc.Recipe.load(moved / "r.yaml", [TINY])).files() == files[0]
    kept = made[0].save(tmp_path / "out")
    facts = json.loads((kept / "manifest.json").read_text())["recipe"]
    assert [f["name"] for f in facts["files"]] == ["r.yaml", "base.yaml", "data.safetensors"]
    assert facts["settings"] == [TINY]
    assert facts["resolved"]["seed"] == 3 and facts["resolved"]["model"] == "tests.cli.factories:tiny"
    # Its resolved recipe is one, and compiles to the same: to all files but the manifest, which names another recipe.
    (tmp_path / "again.yaml").write_text(tfqc.Recipe.load(path).to_yaml())
    assert recipe_of(kept) == facts["resolved"]
    again = tfqc.compile(**tfqc.Recipe.load(tmp_path / "again.yaml", [TINY])).files()
    assert {k: v for k, v in again.items() if k != "manifest.json"} == {
        k: v for k, v in files[0].items() if k != "manifest.json"
    }


def test_what_is_compiled_without_a_recipe_says_nothing_of_one(tmp_path: Path) -> None:
    artifact = tfqc.compile(tiny(), steps=3, calibration=2)
    assert "recipe" not in json.loads(artifact.files()["manifest.json"])
    with pytest.raises(RecipeError, match="was compiled without one"):
        recipe_of(artifact.save(tmp_path / "out"))


def test_a_model_of_ones_own_with_a_recipe(tmp_path: Path) -> None:
    recipe = tfqc.Recipe.load(write(tmp_path, target="fake-quant{weights=4}", steps=3, calibration=2))
    plain = tfqc.compile(tiny(), "fake-quant{weights=4}", steps=3, calibration=2)
    with_it = tfqc.compile(tiny(), **recipe)
    assert with_it.texts == plain.texts
    other = tiny()
    with torch.no_grad():
        other.model.get_parameter("conv_out.weight").add_(1)
    one, two = with_it.facts["recipe"]["weights"], tfqc.compile(other, **recipe).facts["recipe"]["weights"]
    assert one != two and "model" not in with_it.facts["recipe"]["resolved"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 3}, "seed=3 is not what the recipe says, 0: give Recipe.load the setting 'seed=...'"),
        ({"plan": "x"}, "plan='x' is not in the recipe: give Recipe.load the setting 'plan=...'"),
        ({"target": tfqc.Target.parse("fake-quant")}, "is not what the recipe says, 'fake-quant'"),
        ({"recipe": "r.yaml"}, "recipe='r.yaml' is no recipe: give tfqc.Recipe.load(file)."),
    ],
)
def test_what_is_kept_is_how_it_was_made(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    recipe = tfqc.Recipe.load(write(tmp_path, steps=3))
    with pytest.raises(RecipeError) as error:
        tfqc.compile(tiny(), **{**recipe, **changed})
    assert said in str(error.value)


def test_a_folder_lies_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet").mkdir()
    recipe = tfqc.Recipe.load(write(tmp_path, model="unet"))
    assert recipe["model"] == str(tmp_path / "unet") and recipe.resolved["model"] == "unet"


def test_the_schema_tells_all_keys_and_refuses_others() -> None:
    schema = json_schema()
    assert list(schema["properties"]) == list(RecipeFile.model_fields)
    assert schema["additionalProperties"] is False
    assert all("description" in p for p in schema["properties"].values())


def test_the_hash_of_tensors_tells_names_dtypes_shapes_and_values() -> None:
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others = [
        {"b": base["a"], "a": base["b"]}, {**base, "a": base["a"].reshape(2, 3)}, {**base, "a": base["a"] + 1},
        {**base, "b": torch.ones(2, dtype=torch.float16)}, {"a": base["a"]},
    ]  # fmt: skip
    assert len({tensors_hash(t.items()) for t in (base, *others)}) == 6
    strided = {"b": torch.ones(4)[::2], "a": base["a"].clone()}
    assert tensors_hash(base.items()) == tensors_hash(strided.items())
    assert tensors_hash([("s", torch.tensor(1.0, dtype=torch.bfloat16))])
