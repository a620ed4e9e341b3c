"""`tfqc gpu-check` from end to end: without a GPU, and with a stub of one that computes right, wrong, or not at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.cli.factories import unet
from tests.cuda import stub
from tests.cuda.test_kernels_build import without_nvcc
from tfqc.backends.cuda_int4.checking import check, timing
from tfqc.backends.cuda_int4.checking.layers import Layer, sdxl_layers
from tfqc.backends.cuda_int4.checking.vectors import load
from tfqc.backends.cuda_int4.runtime import build
from tfqc.backends.cuda_int4.runtime.specialise import Gemm, Mode, Window, body_for
from tfqc.cli import app
from tfqc.codegen.artifact import Artifact
from tfqc.codegen.known import find_backend
from tfqc.driver import compile
from tfqc.errors import TfqcError
from tfqc.progress import Silent

ROOT = Path(__file__).parents[2]
MODELLED = json.loads((ROOT / "bench" / "results" / "gpu-model.json").read_text())

# Stands for a compiler: what it makes is loaded by the stub, which does not look at it.
NVCC = """#!/bin/sh
for argument; do [ "$last" = -o ] && echo image > "$argument"; last=$argument; done
echo a compiler
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stub.build(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a right device writes for the stored vectors."""
    folder = tmp_path_factory.mktemp("results")
    for vector in load():
        for name, want in vector.outputs.items():
            place = vector.kernel.arguments.index(name)
            (folder / f"{vector.kernel.name}.{place}").write_bytes(want.tobytes())
    return folder


@pytest.fixture
def gpu(library: Path, results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A device that computes the vectors right, a compiler, and few layers; the directory that the command runs in."""
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text(NVCC)
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{compiler.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFQC_LIBCUDA", str(library))
    stub.tell(monkeypatch, results=results, log=tmp_path / "log")
    monkeypatch.setattr(check, "sdxl_layers", small_layers)
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes torch believe that it has CUDA: its device is the CPU, and little is launched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    for name in ("WARM_UP", "GROUPS", "EACH"):
        monkeypatch.setattr(timing, name, 1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = compile(unet(), "cuda-int4{activations=per-token}", steps=2, calibration=1)
    return made.save(tmp_path_factory.mktemp("artifact") / "unet")


def small_layers(mode: Mode, arch: str) -> list[Layer]:
    return [layer for layer in sdxl_layers(mode, arch) if layer.rows < 2500 and layer.kernel.k < 6000]


def call(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner(env={"TERM": "dumb"}).invoke(app, ["gpu-check", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_without_a_driver_the_command_says_so_and_is_content(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "TFQC_LIBCUDA": str(tmp_path / "none.so")}
    command = [sys.executable, "-m", "tfqc", "gpu-check"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        "There is no NVIDIA driver on this machine, so no GPU.\n",
        "",
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_device_neither(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.tell(monkeypatch, devices=0)
    code, out, _ = call("--json")
    assert (code, json.loads(out)["measured"]) == (0, False)
    assert json.loads(out)["because"] == "There is an NVIDIA driver on this machine, but it finds no GPU."
    assert list(gpu.iterdir()) == []


def test_a_device_that_computes_right_is_timed(gpu: Path) -> None:
    code, out, err = call()
    assert code == 0, err
    assert f"All {len(load())} stored vectors agree." in out
    assert "Stub 0, sm_86" in out and "46 at 1.50 GHz" in out
    assert "There is no fp16 to compare with: torch has no CUDA here." in out
    assert "sdxl, w4a4, batch 2, measured" in out and "sdxl, w4a8, batch 2, measured" in out
    assert [file.name for file in gpu.iterdir()] == ["gpu-check.json"]
    report = json.loads((gpu / "gpu-check.json").read_text())
    assert report["measured"] and report["passed"]
    launches = (gpu.parent / "log").read_text().splitlines()
    timed = sum(len(case["layers"] + case["quantize"]) for case in report["cases"])
    assert len(launches) == len(load()) + timed * (20 + 15 * 10)


def test_numbers_have_the_names_of_the_model(gpu: Path) -> None:
    code, out, _ = call("--json", "--out", "deep/er/numbers.json")
    report = json.loads(out)
    assert code == 0 and report == json.loads((gpu / "deep" / "er" / "numbers.json").read_text())
    modelled: dict[str, Any] = next(
        case for case in MODELLED["cases"] if (case["model"], case["mode"], case["arch"]) == ("sdxl", "w4a4", "sm_86")
    )
    case = report["cases"][0]
    assert set(case) - {"quantize"} <= set(modelled)
    assert (case["title"], case["model"], case["mode"], case["arch"]) == ("measured", "sdxl", "w4a4", "sm_86")
    assert set(report["chips"][0]) - {"memory", "driver"} <= set(MODELLED["chips"][0])
    of_model = {line["layer"]: line for line in modelled["layers"]}
    assert case["layers"]
    for line in case["layers"]:
        same = of_model[line["layer"]]
        assert set(line) <= set(same)
        for name in ("count", "operations", "body"):
            assert line[name] == same[name]
        assert line["us"] == 25  # 10 launches in the stub's 250 µs
    assert case["gemm_us"] == 25 * sum(line["count"] for line in case["layers"])


def test_fp16_is_what_torch_computes_of_the_same_products(
    gpu: Path, peer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "sdxl_layers", tiny_layers)
    code, out, _ = call()
    assert code == 0 and "fp16 µs" in out and "torch has no CUDA" not in out
    report = json.loads((gpu / "gpu-check.json").read_text())
    for case in report["cases"]:
        assert [line["layer"].split()[0] for line in case["layers"]] == ["linear", "conv3x3/2"]
        assert all((line["us"], line["fp16_us"], line["ratio"]) == (250, 250, 1) for line in case["layers"])
        assert (case["gemm_us"], case["gemm_fp16_us"], case["gemm_ratio"]) == (1250, 1250, 1)


def tiny_layers(mode: Mode, arch: str) -> list[Layer]:
    body = body_for(arch, mode)
    convolution = Gemm("tfqc_conv", 40, 9 * 32, mode, body, window=Window(6, 4, 2))
    return [
        Layer("linear 70x40x64", 4, Gemm("tfqc_linear", 40, 64, mode, body), 70),
        Layer("conv3x3/2 12x40x288", 1, convolution, 12),
    ]


def test_of_an_artifact_its_own_kernels_are_timed(gpu: Path, artifact: Path) -> None:
    code, out, err = call(artifact)
    assert code == 0, err
    assert "No whole step was timed: torch has no CUDA here." in out
    report = json.loads((gpu / "gpu-check.json").read_text())
    (case,) = report["cases"]
    assert (case["model"], case["mode"], case["batch"]) == ("small-unet", "w4a4", 2)
    lines = {line["layer"]: line for line in case["layers"]}
    assert sum(line["count"] for line in case["layers"]) == 39
    assert lines["conv3x3 128x16x288 bias"]["count"] > 1  # two images of 8 x 8
    assert lines["conv3x3/2 32x16x288 bias"]["operations"] == 2 * 32 * 16 * 288
    assert lines["linear 32x32x32 bias"]["count"] > 1
    names = {line["layer"] for line in case["quantize"]}
    assert {"quantize 200x16 border", "quantize 32x32 tokens"} <= names


@pytest.mark.filterwarnings("ignore:Kernels for CUDA")
def test_of_an_artifact_a_whole_step_is_timed(gpu: Path, peer: None, artifact: Path) -> None:
    code, out, err = call(artifact)
    assert code == 0, err
    assert "a whole step: 0.25 ms" in out
    assert json.loads((gpu / "gpu-check.json").read_text())["cases"][0]["step_us"] == 250


def test_the_list_of_sdxl_is_that_of_the_model() -> None:
    modelled = {(m["model"], m["mode"]): m["layers"] for m in MODELLED["cases"]}
    for mode in ("w4a4", "w4a8"):
        mine = [layer for layer in sdxl_layers(mode, "sm_86") if isinstance(layer.kernel, Gemm)]
        theirs = modelled["sdxl", mode]
        assert {(layer.name, layer.count) for layer in mine} == {(line["layer"], line["count"]) for line in theirs}
        assert sum(layer.count * 2 * layer.rows * layer.kernel.n * layer.kernel.k for layer in mine) == sum(
            line["count"] * line["operations"] for line in theirs
        )


def test_a_device_that_computes_wrong_is_told_apart(
    gpu: Path, results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in results.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    sums, ties = (next(v for v in load() if part in v.kernel.name) for part in ("s32", "geglu_u4"))
    for vector in (sums, ties):
        place = wrong / f"{vector.kernel.name}.{vector.kernel.arguments.index('out')}"
        content = bytearray(place.read_bytes())
        content[3] ^= 1  # a code by one: tolerated where it may be a tie
        place.write_bytes(content)
    stub.tell(monkeypatch, results=wrong)
    code, out, _ = call()
    assert code == 1
    assert f"1 of {len(load())} stored vectors do NOT agree:" in out
    assert re.search(rf"{sums.kernel.name} +1 +264 +16777216 +0\n", out)
    assert ties.kernel.name not in out
    report = json.loads((gpu / "gpu-check.json").read_text())
    assert report["measured"] and not report["passed"]
    assert [v["kernel"] for v in report["vectors"] if not v["passed"]] == [sums.kernel.name]


def test_a_kernel_that_faults_is_named(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.tell(monkeypatch, fail="cuCtxSynchronize")
    code, _, err = call()
    assert code == 1
    assert "CUDA fails while waiting for kernels: CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)." in err
    assert f"The kernel was {load()[0].kernel.name}." in err
    assert list(gpu.iterdir()) == []


def test_without_a_compiler_both_ways_to_one_are_named(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_nvcc(monkeypatch)
    monkeypatch.setattr(build, "_package_folders", tuple)
    code, _, err = call()
    assert (code, "nvcc of a CUDA toolkit on PATH, or `pip install nvidia-cuda-nvrtc`" in err) == (1, True)


def test_a_chip_that_is_too_old_is_refused(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.tell(monkeypatch, capability=75)
    code, _, err = call()
    assert (code, "The kernels do not run on sm_75" in err) == (1, True)


def test_a_backend_without_a_device_says_so() -> None:
    with pytest.raises(TfqcError, match=r"^The backend 'fake-quant' has no device to check\.$"):
        find_backend("fake-quant")().check(None, Silent())


def test_what_is_no_artifact_of_this_backend_is_refused(gpu: Path, tmp_path: Path) -> None:
    code, _, err = call(tmp_path)
    assert (code, "is no artifact: it has no manifest.json" in err) == (1, True)
    other = Artifact({"program.ir": ""}, {}, {"backend": "fake-quant", "target": "fake-quant{}"}).save(tmp_path / "out")
    code, _, err = call(other)
    assert (code, "was compiled for fake-quant{}: compile the model for cuda-int4." in err) == (1, True)
