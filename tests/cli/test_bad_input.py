"""Bad input: one clear sentence, a non-zero exit, and nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.conftest import FEW, TINY, Tfqc
from tests.tiny import tiny
from tfqc.ir.store import save_program
from tfqc.models.find import find_model

W4 = "fake-quant{weights=4}"


def refused(tfqc: Tfqc, *arguments: object) -> str:
    """The message of a command that must fail: the same as text and as JSON, without a traceback."""
    plain = tfqc(*arguments)
    assert plain.code == 1
    assert "Traceback" not in plain.err
    assert "Unexpected" not in plain.err
    assert plain.out == ""
    found = tfqc(*arguments, "--json").json
    assert found["error"] in plain.err
    assert all(line in plain.err for line in found["notes"])
    return found["error"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (TINY, {"--pipeline": "normalise"}, "There is no pass 'normalise'. Did you mean 'normalize'?"),
        (
            TINY,
            {"--pipeline": "normalize,fold-cache{polcy=error}"},
            "Pass 'fold-cache' has no option 'polcy'. Did you mean 'policy'?",
        ),
        (TINY, {"--pipeline": "fold-cache"}, "#1 fold-cache needs stage analyzed but the program is only captured"),
        (TINY, {"--pipeline": "normalize,,"}, "Expected a name at column 11"),
        (TINY, {"--pipeline": "passes.yaml"}, "There is no pipeline file passes.yaml."),
        (TINY, {"--target": "fake-qant"}, "There is no backend 'fake-qant'. Did you mean 'fake-quant'?"),
        (TINY, {"--target": "fake-quant{weights=9}"}, "weights=9 is out of range: 2 to 8 bits"),
        (TINY, {"--target": "fake-quant{weights=four}"}, "'four' is no whole number"),
        (TINY, {"--strategy": "fodl"}, "There is no strategy 'fodl'. Did you mean 'fold'?"),
        (TINY, {"--calibration": "none.safetensors"}, "none.safetensors holds no calibration data"),
        (TINY, {"--schedule": "none.json"}, "The schedule none.json cannot be read: No such file or directory."),
        (TINY, {"--print-ir-after": "fold"}, "--print-ir-after=fold: no such pass in the pipeline."),
        ("fashion-unit", {}, "There is no model 'fashion-unit'"),
        ("tests.cli.factories:missing", {}, "Factory 'tests.cli.factories:missing' cannot be found"),
        ("tests.cli.factories:strange", {}, "returned a str, not a ModelSpec"),
        ("tests.cli.factories:no_scheduler", {}, "needs a schedule: give one"),
        ("tests.cli.factories:branching", {"--pipeline": "normalize"}, "factories.py:"),
        ("tests.cli.factories:nan_weights", {}, "NaN"),
    ],
)
def test_compile_refuses(tfqc: Tfqc, tmp_path: Path, model: str, options: dict[str, str], message: str) -> None:
    flat = [word for pair in options.items() for word in pair]
    assert message in refused(tfqc, "compile", model, *FEW, *flat, "--out", tmp_path / "out")
    left = {p.name for p in tmp_path.iterdir()}
    assert left <= {"out.reproducer", "out.work"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "The schedule is empty"),
        ("[-1e39]", "which is no timestep"),
        ("[NaN]", "which is no timestep"),
        ('{"steps": 3}', "holds no schedule"),
        ("500", "holds no schedule"),
        ("not JSON", "holds no schedule"),
    ],
)
def test_schedules(tfqc: Tfqc, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "schedule.json").write_text(text)
    given = ("--schedule", tmp_path / "schedule.json", "--out", tmp_path / "out")
    assert message in refused(tfqc, "compile", TINY, *given)


def test_nan_in_calibration_data(tfqc: Tfqc, tmp_path: Path) -> None:
    file = tmp_path / "data.safetensors"
    find_model(TINY).calibration(2).save(file)
    tensors = load_file(file)
    tensors["latents"][0, 0, 0, 0] = torch.nan
    save_file(tensors, file, {"guidance": "1.0", "batch_size": "2", "seed": "0"})
    message = refused(tfqc, "compile", TINY, "--calibration", file, "--out", tmp_path / "out")
    assert message == "Calibration: latents holds NaN or infinity."


def test_an_output_that_holds_the_users_files(tfqc: Tfqc, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "new.work").mkdir()
    (tmp_path / "new.work" / "thesis.tex").write_text("years of work")
    before = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    for command in (
        ("compile", TINY, "--out", tmp_path),
        ("compile", TINY, "--out", tmp_path / "file"),
        ("compile", TINY, *FEW, "--out", tmp_path / "new"),
        ("compile", TINY, *FEW, "--out", tmp_path / "out", "--dump-ir", tmp_path),
        ("compare", TINY, TINY, "--out", tmp_path),
        ("demo", "--out", tmp_path),
        ("sample", TINY, "--out", tmp_path),
    ):
        assert "choose" in (message := refused(tfqc, *command)) or "is a directory" in message
    assert {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("compare", TINY, TINY), "trajectory.png"), (("demo",), "grid.png"),
        (("compile", TINY, "--out", "OUT/new", "--dump-ir"), "pipeline.txt"),
    ],
)  # fmt: skip
def test_somebodys_files_of_such_names(tfqc: Tfqc, tmp_path: Path, command: tuple[str, ...], name: str) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).write_text('{"mine": 1}')
    words = [word.replace("OUT", str(tmp_path)) for word in command]
    words += [] if words[-1] == "--dump-ir" else ["--out"]
    assert f"holds {name!r}, which is no" in refused(tfqc, *words, tmp_path / "results")
    assert (tmp_path / "results" / name).read_text() == '{"mine": 1}'


def test_opt_replaces_programs_alone(tfqc: Tfqc, tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    (tmp_path / "n.txt").write_text("years of work")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    message = refused(tfqc, "opt", tmp_path / "p.ir", "-p", "normalize", "-o", tmp_path / "n.txt")
    assert message == f"{tmp_path / 'n.txt'} is no program, so it is not replaced: choose another name."
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    """An artifact that may be spoilt."""
    return Path(shutil.copytree(artifact, tmp_path / "copied"))


@pytest.mark.parametrize("command", [("sample", "--out", "x.png"), ("inspect",)])
def test_spoilt_artifacts(tfqc: Tfqc, copied: Path, command: tuple[str, ...]) -> None:
    def message() -> str:
        model = ("--model", "tests.cli.factories:unet") if command[0] == "sample" else ()
        return refused(tfqc, command[0], copied, *command[1:], *model)

    weights = copied / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "weights.safetensors has been changed since it was written" in message()
    weights.unlink()
    assert "'weights.safetensors' is missing" in message()
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"version": 3}))
    assert "format version 3, newer than 2, which this tfqc reads: upgrade tfqc." in message()
    (copied / "manifest.json").write_text("{")
    assert "is no JSON" in message()


def test_an_artifact_of_an_unknown_model_is_not_guessed_at(tfqc: Tfqc, artifact: Path) -> None:
    assert "say with --model where that model is" in refused(tfqc, "sample", artifact, "--out", "x.png")


def test_a_timestep_that_the_artifact_refuses(tfqc: Tfqc, tmp_path: Path) -> None:
    out = tmp_path / "out"
    unet = "tests.cli.factories:unet"
    assert tfqc("compile", unet, *FEW, "--target", "fake-quant{policy=error}", "--out", out).code == 0
    message = refused(tfqc, "sample", out, "--steps", 4, "--model", unet, "--out", tmp_path / "x.png")
    assert "is not in the schedule of 3 steps" in message


def test_opt_refuses(tfqc: Tfqc, tmp_path: Path) -> None:
    assert "give an .ir file" in refused(tfqc, "opt", tmp_path / "none.ir", "-p", "normalize")
    program = tmp_path / "tiny.ir"
    save_program(tiny(), program)
    assert "needs the table" in refused(tfqc, "opt", program, "-p", "normalize,select-maintenance")
    assert "needs a schedule" in refused(tfqc, "opt", program, "-p", "normalize,discover-tib,measure-disturbance")
    text = program.read_text()
    program.write_text(text.replace("tfqc-ir 1", "tfqc-ir 2"))
    assert "2" in refused(tfqc, "opt", program, "-p", "normalize")
    program.write_text(text.replace("aten.silu.default", "aten.siluu.default"))
    assert "siluu" in refused(tfqc, "inspect", program)


def test_names_that_do_not_exist(tfqc: Tfqc, tmp_path: Path) -> None:
    assert "Did you mean 'fold-cache'?" in refused(tfqc, "passes", "fold-cach")
    assert "There is no backend" in refused(tfqc, "backends", "none")
    assert "There is no" in refused(tfqc, "inspect", tmp_path / "none")
    assert "it has no manifest.json" in refused(tfqc, "inspect", tmp_path)


@pytest.mark.parametrize(
    "arguments", [("compile", TINY), ("sample", TINY, "--images", 0, "--out", "x.png"), ("unknown",), ("opt",)]
)
def test_wrong_usage_exits_with_2(tfqc: Tfqc, arguments: tuple[object, ...]) -> None:
    done = tfqc(*arguments)
    assert (done.code, done.out) == (2, "")
    assert "Usage" in done.err


def test_unexpected_exceptions_say_how_to_see_more(tfqc: Tfqc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("tfqc.models.find.find_model", broken)
    arguments = ("compile", TINY, "--out", tmp_path / "out")
    done = tfqc(*arguments)
    assert done.code == 1
    assert done.err.startswith("Unexpected IndexError at test_bad_input.py:")
    assert "Set TFQC_DEBUG=1 to see the traceback." in done.err
    monkeypatch.setenv("TFQC_DEBUG", "1")
    assert tfqc(*arguments).err == ""  # the exception itself came through


def test_an_artifact_with_no_more_than_it_needs_is_shown(tfqc: Tfqc, copied: Path) -> None:
    needed = ("format", "version", "runtime", "files")
    whole = json.loads((copied / "manifest.json").read_text())
    assert len(whole) > len(needed) + 8
    for left_out in [*whole.keys() - needed, None]:
        some = {k: v for k, v in whole.items() if (k != left_out if left_out else k in needed)}
        (copied / "manifest.json").write_text(json.dumps(some))
        done = tfqc("inspect", copied)
        assert done.code == 0 and "weights.safetensors" in done.out
        assert tfqc("inspect", copied, "--json").json["files_are_whole"]


def test_names_command_no_terminal(tfqc: Tfqc, copied: Path) -> None:
    whole = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(whole | {"model": "\x1b[2Jcleared", "report": ["a\rb"]}))
    done = tfqc("inspect", copied)
    assert done.code == 0 and r"\x1b[2Jcleared" in done.out and r"a\rb" in done.out
    assert done.out.replace("\n", "").isprintable()


def test_an_artifact_whose_save_was_killed_is_found(tfqc: Tfqc, copied: Path) -> None:
    for command in (("inspect", copied), ("sample", copied, "--out", copied.with_name("x.png"), "--images", 1,
                                          "--model", "tests.cli.factories:unet")):  # fmt: skip
        copied.rename(copied.with_name(f".{copied.name}.old4194305"))
        done = tfqc(*command)
        assert done.code == 0, done.err
