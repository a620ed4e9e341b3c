"""`tfqc bisect` and `--check-numerics`: the pass that breaks what it declares is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import TINY, Tfqc
from tests.tiny import tiny
from tfqc import registry
from tfqc.ir.store import save_program
from tfqc.passing.known import find_pass

PASSES = "normalize,discover-tib,sloppy,discover-tib"


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.PASSES, "sloppy", "tests.tiny:Sloppy")
    registry.entries.cache_clear()
    save_program(tiny(), tmp_path / "p.ir")
    yield tmp_path / "p.ir"
    registry.entries.cache_clear()
    find_pass.cache_clear()


def test_the_first_wrong_pass_and_the_first_wrong_value_are_named(tfqc: Tfqc, before: Path) -> None:
    found = tfqc("bisect", before, "-p", PASSES, "--json")
    assert found.code == 1
    culprit = found.json["culprit"]
    assert (culprit["number"], culprit["name"]) == (3, "sloppy")
    assert culprit["nodes"] == ["silu"], "silu_1 differs too, and reads it"
    assert any(line.startswith("silu = aten.mul.Tensor(bare, 1.1") for line in culprit["made"])
    assert culprit["error"] > culprit["allowed"] == 0
    assert "#3 sloppy moved the outputs by" in tfqc("bisect", before, "-p", PASSES).out


def test_passes_that_keep_to_what_they_declare(tfqc: Tfqc, before: Path) -> None:
    done = tfqc("bisect", before, "-p", "normalize,discover-tib")
    assert (done.code, done.out) == (0, "All 2 passes keep to what they declare.\n")


def test_a_model_is_captured_first(tfqc: Tfqc, before: Path) -> None:
    found = tfqc("bisect", TINY, "-p", "normalize,sloppy", "--steps", "3", "--json")
    assert found.json["culprit"]["number"] == 2


def test_opt_checks_numerics_when_asked(tfqc: Tfqc, before: Path) -> None:
    assert tfqc("opt", before, "-p", PASSES).code == 0
    refused = tfqc("opt", before, "-p", PASSES, "--check-numerics")
    assert refused.code == 1
    assert "sloppy declares exact numerics" in refused.err
