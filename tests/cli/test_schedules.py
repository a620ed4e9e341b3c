"""Schedulers that more than a number of steps has set, and schedules without one, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import TINY, Tfqc
from tfqc.codegen.artifact import read_manifest
from tfqc.sampling.calls import ModelCalls

SHIFTED, STRAIGHT = "tests.cli.factories:shifted", "tests.cli.factories:straight"
TARGET = ("--target", "fake-quant{weights=8 activations=8}", "--calibration-images", 2)


@pytest.mark.parametrize(
    ("model", "options", "times"),
    [
        (SHIFTED, (), [1000.0]),
        (STRAIGHT, ("--steps", 4), [0.0, 250.0, 500.0, 750.0]),
    ],
)  # fmt: skip
def test_sampled_as_it_was_set(
    tfqc: Tfqc, tmp_path: Path, model: str, options: tuple[object, ...], times: list[float]
) -> None:
    """Compiled for the factory's own scheduler, and sampled with it; a warning would be an error."""
    done = tfqc("compile", model, *TARGET, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    schedule = read_manifest(tmp_path / "out")["schedule"]
    assert schedule["timesteps"][: len(times)] == times
    for subject in (tmp_path / "out", model):
        out = tmp_path / "latents.safetensors"
        steps = ("--steps", 4) if subject == STRAIGHT else ()
        done = tfqc("sample", subject, "--model", model, "--images", 2, *steps, "--out", out, "--json")
        assert done.code == 0, done.err
        assert done.json["steps"] == len(schedule["timesteps"])
        assert load_file(out)["latents"].isfinite().all()
    done = tfqc("compare", model, tmp_path / "out", "--model", model, "--images", 2, "--json")
    assert done.code == 0, done.err
    assert done.json["timesteps"] == schedule["timesteps"]
    assert {SHIFTED: "FlowMatchEulerDiscreteScheduler", STRAIGHT: "Straight"}[model] in tfqc(
        "inspect", tmp_path / "out"
    ).out


def test_other_steps_of_a_shifted_scheduler_want_mu(tfqc: Tfqc, tmp_path: Path) -> None:
    done = tfqc("sample", SHIFTED, "--steps", 5, "--images", 1, "--out", tmp_path / "x.safetensors")
    assert done.code != 0 and "call set_timesteps(5, mu=...)" in done.err


def test_rising_times_with_calls_from_a_file(tfqc: Tfqc, tmp_path: Path) -> None:
    times = [0.0, 250.5, 750.25]
    (tmp_path / "times.json").write_text(json.dumps(times))
    calls = [{"sample": torch.randn(2, 2, 4, 4), "timestep": t} for t in times]
    ModelCalls.of(calls).save(tmp_path / "calls.safetensors")
    given = ("--schedule", tmp_path / "times.json", "--calibration", tmp_path / "calls.safetensors")
    done = tfqc("compile", TINY, *TARGET[:2], *given, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "out")["schedule"] == {"timesteps": times, "sampler": {}}
