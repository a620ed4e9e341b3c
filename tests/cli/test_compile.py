"""`tfqc compile`: what it writes, says, keeps and removes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import FEW, TINY, Tfqc
from tfqc import registry
from tfqc.ir.store import load_program
from tfqc.models.find import find_model
from tfqc.passing.known import find_pass

PIPELINE = "normalize,discover-tib,select-maintenance,fold-cache"


@pytest.fixture
def exploding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pass that fails, under the name `explode`."""
    monkeypatch.setitem(registry.PASSES, "explode", "tests.tiny:Explode")
    registry.entries.cache_clear()
    yield
    registry.entries.cache_clear()
    find_pass.cache_clear()


def test_it_leaves_the_artifact_and_nothing_else(tfqc: Tfqc, tmp_path: Path) -> None:
    done = tfqc("compile", TINY, *FEW, "--out", tmp_path / "out")
    assert done.code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert "calibrate-activations" in done.out
    assert "left in floating point" in done.out or "fold:" in done.out
    assert "sampling calibration images in full precision: 3 in" in done.err


def test_json_stands_alone_on_stdout(tfqc: Tfqc, tmp_path: Path) -> None:
    done = tfqc("compile", TINY, *FEW, "--out", tmp_path / "out", "--json", "--print-ir-after", "normalize")
    assert done.json["target"] == "fake-quant"
    assert done.json["passes"][0]["name"] == "normalize"
    assert done.json["bytes"]["total"] > 0
    assert "// after #1 normalize" in done.err


def test_it_compiles_again_over_its_own_artifact(tfqc: Tfqc, tmp_path: Path) -> None:
    for strategy in ("fold", "tib"):
        assert tfqc("compile", TINY, *FEW, "--strategy", strategy, "--out", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "select-maintenance{strategy=tib}" in manifest["pipeline"]


def test_a_pipeline_of_the_users_own_from_a_file(tfqc: Tfqc, tmp_path: Path) -> None:
    file = tmp_path / "passes.yaml"
    file.write_text("- normalize\n- discover-tib\n- select-maintenance: {strategy: table}\n- fold-cache\n")
    done = tfqc("compile", TINY, "--pipeline", file, "--steps", 3, "--out", tmp_path / "out", "--json")
    assert done.json["pipeline"] == "normalize,discover-tib,select-maintenance{strategy=table},fold-cache"


def test_a_schedule_and_calibration_data_from_files(tfqc: Tfqc, tmp_path: Path) -> None:
    (tmp_path / "schedule.json").write_text("[900, 500, 1]")
    options = ("--schedule", tmp_path / "schedule.json", "--pipeline", PIPELINE)
    assert tfqc("compile", TINY, *options, "--out", tmp_path / "a").code == 0
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["schedule"]["timesteps"] == [900, 500, 1]
    find_model(TINY).calibration(3, seed=5).save(tmp_path / "data.safetensors")
    given = ("--calibration", tmp_path / "data.safetensors")
    assert tfqc("compile", TINY, "--steps", 3, *given, "--out", tmp_path / "b").code == 0
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert (manifest["calibration"]["images"], manifest["calibration"]["seed"]) == (3, 5)


def test_dumps_and_printed_ir(tfqc: Tfqc, tmp_path: Path) -> None:
    options = ("--dump-ir", tmp_path / "ir", "--print-ir-after", "change")
    done = tfqc("compile", TINY, *FEW, "--out", tmp_path / "out", *options)
    names = {p.name for p in (tmp_path / "ir").iterdir()}
    assert {"00-capture.ir", "pipeline.txt", "remarks.json", "timing.json", ".written.json"} < names
    assert done.out.count("// after #") == len(names) - 5


def test_a_failure_leaves_a_reproducer_and_what_was_there(tfqc: Tfqc, tmp_path: Path, exploding: None) -> None:
    out = tmp_path / "out"
    assert tfqc("compile", TINY, *FEW, "--out", out).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    passes = "normalize,discover-tib,select-maintenance,calibrate-activations,explode{why=because}"
    done = tfqc("compile", TINY, *FEW, "--pipeline", passes, "--out", out)
    assert done.code == 1
    assert "Pass #5 explode failed: KeyError: 'because'" in done.err.splitlines()
    assert f"Kept 1 finished batch of calibration trajectories in {out}.work" in done.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    command = (tmp_path / "out.reproducer" / "command.txt").read_text()
    replayed = tfqc(*shlex.split(command)[1:])
    assert replayed.code == 1
    assert "Pass #1 explode failed: KeyError: 'because'" in replayed.err
    # The replay leaves nothing that the next failure would stumble over.
    assert tfqc("compile", TINY, *FEW, "--pipeline", passes, "--out", out).err.startswith("capturing tiny")


def test_opt_takes_up_what_was_dumped(tfqc: Tfqc, tmp_path: Path) -> None:
    tfqc("compile", TINY, *FEW, "--out", tmp_path / "out", "--dump-ir", tmp_path / "ir")
    source, result = tmp_path / "ir" / "00-capture.ir", tmp_path / "found.ir"
    done = tfqc("opt", source, "-p", "normalize,discover-tib", "-o", result)
    assert done.code == 0
    assert "discover-tib" in done.out
    assert "tib" in load_program(result).tables
    printed = tfqc("opt", source, "-p", "normalize,discover-tib")
    assert printed.out == result.read_text()


def test_opt_with_weights_gives_the_same_outputs(tfqc: Tfqc, tmp_path: Path) -> None:
    from tests.tiny import INPUTS, tiny
    from tfqc.ir.store import save_program

    program, result = tmp_path / "tiny.ir", tmp_path / "folded.ir"
    save_program(tiny(), program)
    (tmp_path / "schedule.json").write_text("[421, 7]")
    options = ("--schedule", tmp_path / "schedule.json", "-o", result, "--json")
    done = tfqc("opt", program, "-p", PIPELINE, *options)
    assert done.json["stage"] == "folded"
    torch.testing.assert_close(load_program(result)(**INPUTS), tiny()(**INPUTS))
