"""What a backend does not run is refused with the pass that left it."""

from __future__ import annotations

import re

import pytest
import torch

import tfqc
from tests.tiny import tiny
from tfqc.backends.fake_quant.backend import FakeQuantBackend
from tfqc.codegen.left import MadeBy
from tfqc.codegen.support import YES, Support
from tfqc.errors import TfqcError
from tfqc.instruments import VerifyEach
from tfqc.ir.program import Program
from tfqc.passing.pipeline import Pipeline


def refuses(monkeypatch: pytest.MonkeyPatch, target: object) -> None:
    def supports(_backend: object, program: Program, node: torch.fx.Node, options: object) -> Support:
        return Support(False, "it has no kernel") if node.target is target else YES

    monkeypatch.setattr(FakeQuantBackend, "supports", supports)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("supports", r"FakeQuantBackend\.supports answered True for .*: give a Support"),
        ("emit", r"FakeQuantBackend\.emit returned a bool: give an Artifact"),
    ],
)
def test_what_a_backend_answers_is_looked_at(method: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeQuantBackend, method, lambda *_: True)
    with pytest.raises(TfqcError, match=message):
        tfqc.compile(tiny(), "fake-quant", pipeline="normalize", schedule=[5.0, 2.0])


@pytest.mark.parametrize(
    ("target", "who"),
    [
        (torch.ops.tfqc.table_read.default, r"it has no kernel; #\d+ fold-cache left it"),
        (torch.ops.aten.silu.default, "it has no kernel; it was captured so, and no pass lowered it"),
    ],
    ids=str,
)
def test_the_pass_is_named(target: object, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(monkeypatch, target)
    pipeline = "normalize,discover-tib,select-maintenance{strategy=table},fold-cache"
    with pytest.raises(TfqcError) as caught:
        tfqc.compile(tiny(), "fake-quant", pipeline=pipeline, schedule=[5.0, 2.0])
    assert "fake-quant does not run" in str(caught.value)
    assert any(re.search(who, note) for note in caught.value.__notes__)


def test_it_remembers_who_came_first() -> None:
    made, program = MadeBy(), tiny()
    Pipeline.parse("normalize,discover-tib,select-maintenance,normalize").run(program, instruments=[made])
    assert {made.of(n) for n in program.step.nodes if n.op == "call_function"} == {
        "it was captured so, and no pass lowered it"
    }


def test_levels_of_verification() -> None:
    """`fast` sees a program's form, `full` its types too."""
    bare, mistyped = tiny(), tiny()
    del bare.types["silu"]
    mistyped.types["silu"] = mistyped.types["conv2d_1"]
    for level in ("fast", "full"):
        with pytest.raises(TfqcError, match="has no type"):
            VerifyEach(level).start(bare, Pipeline(()))  # type: ignore[arg-type]
    VerifyEach("fast").start(mistyped, Pipeline(()))
    with pytest.raises(TfqcError, match=r"%silu.* is declared"):
        VerifyEach("full").start(mistyped, Pipeline(()))


def test_the_command_line_has_the_levels() -> None:
    from typer.testing import CliRunner

    from tfqc.cli import app

    done = CliRunner().invoke(app, ["opt", "--help"])
    assert "full|fast|off" in done.output.replace(" ", "").replace("\n", "")
