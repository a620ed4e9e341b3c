"""`tfqc sample`, `compare`, `inspect`, `demo` and the listings: what they show."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cli.conftest import UNET, Tfqc
from tests.tiny import tiny
from tfqc import registry
from tfqc.codegen.backend import Backend
from tfqc.ir.store import save_program
from tfqc.passing.known import find_pass


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        return image.size


def test_sample_the_builtin_model_labelled_by_class(tfqc: Tfqc, tmp_path: Path) -> None:
    done = tfqc("sample", "fashion-unet", "--images", 12, "--steps", 2, "--out", tmp_path / "grid.png", "--json")
    assert (done.json["steps"], done.json["guidance"]) == (2, 2.0)
    width, height = size_of(tmp_path / "grid.png")
    assert width > 10 * 84 and 2 * 84 < height < 3 * 84


def test_sample_an_artifact_as_picture_and_as_latents(tfqc: Tfqc, artifact: Path, tmp_path: Path) -> None:
    for name in ("grid.png", "latents.safetensors"):
        done = tfqc("sample", artifact, "--model", UNET, "--images", 4, "--out", tmp_path / name)
        assert done.code == 0, done.err
        assert "4 images, 3 steps" in done.out
    assert load_file(tmp_path / "latents.safetensors")["latents"].shape == (4, 3, 8, 8)
    assert size_of(tmp_path / "grid.png")[0] > 100


@pytest.mark.parametrize("model", ["tiny", "dit", "sdxl"])
def test_sample_models_with_other_inputs(tfqc: Tfqc, tmp_path: Path, model: str) -> None:
    out = tmp_path / "latents.safetensors"
    done = tfqc("sample", f"tests.cli.factories:{model}", "--images", 3, "--steps", 2, "--out", out)
    assert done.code == 0, done.err
    assert len(load_file(out)["latents"]) == 3


def test_the_same_seed_gives_the_same_latents(tfqc: Tfqc, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for file, seed in zip(files, (7, 7, 8), strict=True):
        tfqc("sample", UNET, "--images", 2, "--steps", 2, "--seed", seed, "--out", file)
    a, b, c = (load_file(file)["latents"] for file in files)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_compare_a_model_with_itself_and_with_its_artifact(tfqc: Tfqc, artifact: Path, tmp_path: Path) -> None:
    same = tfqc("compare", UNET, UNET, "--images", 2, "--steps", 2)
    assert "final images: equal" in same.out
    out = tmp_path / "compared"
    options = ("--images", 3, "--model", UNET, "--out", out)
    done = tfqc("compare", UNET, artifact, *options, "--json")
    value = done.json
    assert value == json.loads((out / "compared.json").read_text())
    assert len(value["timesteps"]) == len(value["psnr_by_step"]) == 3  # the artifact's own schedule
    assert 0 < value["psnr_by_step"][-1] == value["psnr_latents"] < 140
    assert value["b"]["bytes"]["total"] < value["a"]["bytes"]["fp32"]
    assert {p.name for p in out.iterdir()} == {"compared.json", "compared.png", "trajectory.png"}
    text = tfqc("compare", UNET, artifact, *options).out
    assert "PSNR of the latents" in text and "data range" in text


def test_compare_measures_the_models_own_metrics(tfqc: Tfqc) -> None:
    value = tfqc("compare", "fashion-unet", "fashion-unet", "--images", 2, "--steps", 1, "--json").json
    assert list(value["a"]["metrics"]) == ["class accuracy"]
    assert value["metrics_left_out"] == ["FD(fashion-cnn)"]
    assert value["psnr_images"] == 140


def test_inspect_an_artifact(tfqc: Tfqc, artifact: Path) -> None:
    value = tfqc("inspect", artifact, "--json").json
    assert value["files_are_whole"]
    quantized = value["program"]["quantized"]
    assert set(quantized["weights"]) == {"4 bits or fewer, packed", "8 bits"}  # first and last layer
    assert set(quantized["inputs"]) == {"8 bits"}
    text = tfqc("inspect", artifact).out
    assert "weights.safetensors" in text and "3 steps from" in text and "4 bits or fewer, packed" in text


def test_inspect_a_program(tfqc: Tfqc, tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "tiny.ir")
    tfqc("opt", tmp_path / "tiny.ir", "-p", "normalize,discover-tib,select-maintenance", "-o", tmp_path / "b.ir")
    value = tfqc("inspect", tmp_path / "b.ir", "--json").json
    assert value["stage"] == "analyzed"
    assert {i["name"]: i["role"] for i in value["inputs"]} == {"sample": "sample", "timestep": "time"}
    assert [f["module"] for f in value["features"]] == ["time.2"]
    assert value["functions"]["step"]["aten.conv2d.default"] == 2
    text = tfqc("inspect", tmp_path / "b.ir").out
    assert "time.2" in text and "fold" in text


def test_listings(tfqc: Tfqc) -> None:
    rows = {row["name"]: row for row in tfqc("passes", "--json").json}
    assert set(registry.PASSES) <= set(rows)
    assert rows["fold-cache"]["reaches"] == "folded"
    assert rows["fold-cache"]["options"]["policy"]["default"] == "recompute"
    assert all(row["owner"] and row["summary"] for row in rows.values())
    assert all(row["summary"].endswith(".") for row in rows.values() if row["owner"] == "tfqc")  # whole sentences
    assert "recompute|nearest|error" in tfqc("passes", "fold-cache").out
    assert "fake-quant" in tfqc("backends").out
    assert "static|per-step|per-token" in tfqc("backends", "fake-quant").out
    assert [row["name"] for row in tfqc("models", "--json").json] == ["fashion-unet"]
    value = tfqc("env", "--json").json
    assert value["torch"] and value["cores"] >= 1 and "avx2" in value["cpu_flags"]


def test_what_a_plugin_does_not_say_of_itself_is_not_said_for_it(tfqc: Tfqc, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = registry.entries("backends") | {"silent": registry.Entry("silent", f"{__name__}:Silent", "someone")}
    monkeypatch.setattr(registry, "entries", lambda group: entries)
    assert tfqc("backends", "silent").out.startswith("name   silent")


class Silent(Backend):
    name = "silent"
    options = dataclasses.make_dataclass("Options", [("weights", int, 8)], frozen=True)


def test_a_broken_plugin_is_listed_with_its_reason(tfqc: Tfqc, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = dict(registry.entries("passes")) | {"broken": registry.Entry("broken", "no.such:Thing", "someone")}
    monkeypatch.setattr(registry, "entries", lambda group: entries)
    done = tfqc("passes")
    assert done.code == 0
    assert "does not load" in done.out and "fold-cache" in done.out
    find_pass.cache_clear()


def test_demo_in_small(tfqc: Tfqc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tfqc.cli.demo.CALIBRATION_IMAGES", 2)
    quick = "cpu-int8"  # no reconstruction
    monkeypatch.setattr("tfqc.cli.demo.COMPILED", {"naive": (quick, "tib"), "fold": (quick, "fold")})
    out = tmp_path / "demo"
    out.mkdir()
    (out / "results.json").write_text("of an earlier run")
    done = tfqc("demo", "--images", 2, "--steps", 2, "--out", out, "--json")
    assert done.code == 0, done.err
    rows = done.json["rows"]
    assert list(rows) == ["full precision", "naive", "fold"]
    assert rows["fold"]["features"]["mean_error"] == 0
    assert rows["naive"]["features"]["mean_error"] > 0
    assert all(0 < rows[name]["psnr_images"] < 140 for name in ("naive", "fold"))
    assert {p.name for p in out.iterdir()} == {
        "disturbance.png", "fold", "grid.png", "ir", "naive", "results.json", "trajectory.png",
    }  # fmt: skip
    assert (out / "ir" / "fold" / "00-capture.ir").exists()
    assert not (tmp_path / "demo.work").exists()
