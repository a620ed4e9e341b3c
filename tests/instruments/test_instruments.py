"""Instruments: dumps, prints, timing, numerics, reproducers."""

from __future__ import annotations

import io
import json
import mmap
import shlex
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.tiny import Explode, make_pass, scale_output, tiny
from tfqc import registry
from tfqc.errors import PassError, TfqcError
from tfqc.instruments import CheckNumerics, DumpIR, Instrument, PrintIR, Reproducer, Timing, VerifyEach
from tfqc.instruments.numerics import example_call, relative_error
from tfqc.ir.program import Program, Stage
from tfqc.ir.render import render
from tfqc.ir.rows import Schedule
from tfqc.ir.store import load_program
from tfqc.passing import EXACT, LOSSY, Context, Pass, close
from tfqc.passing.known import find_pass
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule

NOTHING = make_pass("nothing")


def scale(factor: float, name: str = "scale", **declared: object) -> Pass:
    return make_pass(name, scale_output(factor), **declared)


def run(*passes: Pass, instrument: Instrument, program: Program | None = None) -> Program:
    return Pipeline(passes).run(program or tiny(), instruments=[VerifyEach(), instrument])


# -- dumps ---------------------------------------------------------------------------------------------------


def test_dumps_are_numbered_and_only_written_for_changes(tmp_path: Path) -> None:
    program = tiny()
    before = render(program)
    run(
        NOTHING,
        scale(2.0, "first"),
        NOTHING,
        scale(3.0, "last"),
        instrument=DumpIR(tmp_path),
        program=program,
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".written.json", "00-capture.ir", "02-first.ir", "04-last.ir", "pipeline.txt", "remarks.json",
    ]  # fmt: skip
    assert (tmp_path / "00-capture.ir").read_text() == before
    assert (tmp_path / "04-last.ir").read_text() == render(program)
    assert (tmp_path / "pipeline.txt").read_text() == "nothing,first,nothing,last\n"


def test_the_difference_of_two_dumps_is_what_the_pass_did(tmp_path: Path) -> None:
    run(scale(2.0), instrument=DumpIR(tmp_path))
    before, after = ((tmp_path / n).read_text().splitlines() for n in ("00-capture.ir", "01-scale.ir"))
    added = [line.strip().split("   {")[0] for line in after if line not in before]
    assert added == ["%scaled: Bx2x4x4xf32 = aten.mul.Tensor(%conv2d_1, 2.0)", "return %scaled"]


def test_a_later_dump_replaces_an_earlier_one_and_keeps_its_reproducer(tmp_path: Path) -> None:
    (tmp_path / "reproducer").mkdir()
    Pipeline((NOTHING, scale(2.0))).run(tiny(), instruments=[DumpIR(tmp_path), Timing(tmp_path)])
    program = tiny()
    program.stage = Stage.NORMALIZED  # for the name of the first file; the verifier is not asked
    Pipeline((scale(2.0),)).run(program, instruments=[DumpIR(tmp_path)])
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".written.json", "00-input.ir", "01-scale.ir", "pipeline.txt", "remarks.json", "reproducer",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [DumpIR, Reproducer])
def test_a_directory_of_foreign_files_is_refused_and_left_alone(
    tmp_path: Path, make: type[DumpIR] | type[Reproducer]
) -> None:
    for name in ("00-capture.ir", "before.ir", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(TfqcError, match=r"holds '.*', which is no .*: choose another directory\."):
        run(NOTHING, instrument=make(tmp_path))
    assert all(f.read_text() == "mine" for f in tmp_path.iterdir())
    with pytest.raises(TfqcError, match="is a file: choose a directory"):
        run(NOTHING, instrument=make(tmp_path / "thesis.tex"))


@pytest.mark.parametrize(
    ("make", "mine"),
    [(DumpIR, "pipeline.txt"), (DumpIR, "01-notes.ir"), (Reproducer, "calibration.safetensors"),
     (Reproducer, "schedule.json")],
)  # fmt: skip
def test_somebodys_files_of_such_names_are_left_alone(
    tmp_path: Path, make: type[DumpIR] | type[Reproducer], mine: str
) -> None:
    (tmp_path / mine).write_text("mine")
    with pytest.raises(TfqcError, match=rf"holds '{mine}', which is no .*: choose another directory\."):
        run(NOTHING, instrument=make(tmp_path))
    (tmp_path / mine).rename(tmp_path / "elsewhere")
    (tmp_path / "dump").mkdir()
    for name in ("00-capture.ir", "before.ir"):
        (tmp_path / "dump" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TfqcError, match=r"choose another directory"):
        run(NOTHING, instrument=make(tmp_path / "dump"))
    assert (tmp_path / "elsewhere").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("99-mine.ir", r"holds '99-mine\.ir', which is no IR dump: choose another directory\."),
        ("02-first.ir", r"02-first\.ir has been changed since it was written, so it is not replaced"),
        ("timing.json", r"timing\.json has been changed since it was written, so it is not replaced"),
        (".written.json", r"holds '\.written\.json', which is no IR dump: choose another directory\."),
    ],
)
def test_what_a_user_added_to_a_dump_or_edited_stays(name: str, message: str, tmp_path: Path) -> None:
    passes = (NOTHING, scale(2.0, "first"))
    Pipeline(passes).run(tiny(), instruments=[DumpIR(tmp_path), Timing(tmp_path)])
    (tmp_path / name).write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TfqcError, match=message):
        Pipeline(passes).run(tiny(), instruments=[DumpIR(tmp_path), Timing(tmp_path)])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    for file in tmp_path.iterdir():
        file.unlink()
    run(*passes, instrument=DumpIR(tmp_path))


@pytest.mark.parametrize("name", ["before.ir", "error.txt", "schedule.json"])
def test_what_a_user_added_to_a_reproducer_or_edited_stays(name: str, tmp_path: Path) -> None:
    with pytest.raises(PassError):
        run(Explode(), instrument=Reproducer(tmp_path))
    (tmp_path / name).write_text("mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TfqcError, match=r"choose another directory"):
        run(Explode(), instrument=Reproducer(tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


# -- prints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "headers"),
    [
        ("all", ["// after #1 nothing", "// after #2 scale", "// after #3 nothing"]),
        ("change", ["// after #2 scale"]),
        ("nothing", ["// after #1 nothing", "// after #3 nothing"]),
    ],
)
def test_programs_are_printed_after_the_passes_asked_for(which: str, headers: list[str]) -> None:
    stream = io.StringIO()
    program = run(NOTHING, scale(2.0), NOTHING, instrument=PrintIR(which, stream))
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.startswith("//")] == headers
    assert stream.getvalue().endswith(render(program) + "\n")


def test_printing_after_an_absent_pass_is_refused() -> None:
    with pytest.raises(TfqcError, match=r"--print-ir-after=scael: no such pass.*Did you mean 'scale'\?"):
        run(scale(2.0), instrument=PrintIR("scael"))


def test_prints_go_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    run(NOTHING, instrument=PrintIR("all"))
    assert capsys.readouterr().out.startswith("// after #1 nothing\ntfqc-ir 1\n")


# -- timing --------------------------------------------------------------------------------------------------


def test_timing_is_written_as_json(tmp_path: Path) -> None:
    timing = Timing(tmp_path / "new")
    program = run(NOTHING, scale(2.0), instrument=timing)
    rows = json.loads((tmp_path / "new" / "timing.json").read_text())
    assert [(r["number"], r["name"]) for r in rows] == [(1, "nothing"), (2, "scale")]
    assert rows[1]["nodes"] == rows[0]["nodes"] + 1 == sum(n.op == "call_function" for n in program.nodes())
    assert all(r["seconds"] >= 0 and r["peak_mib"] > 1 for r in rows)
    assert [t.name for t in timing.passes] == ["nothing", "scale"]


def test_peak_memory_is_that_of_the_pass() -> None:
    def hungry(program: Program, ctx: Context) -> None:
        with mmap.mmap(-1, 128 * 2**20) as fresh:  # an allocator may hand out memory that tests before had freed
            for page in range(0, len(fresh), mmap.PAGESIZE):
                fresh[page] = 1
            time.sleep(0.5)  # on busy cores the thread that looks may come late

    timing = Timing()
    run(NOTHING, make_pass("hungry", hungry), instrument=timing)
    assert timing.passes[1].peak_mib > timing.passes[0].peak_mib + 40


def test_timing_of_a_run_that_fails_tells_of_the_passes_before_and_stops_its_thread(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    with pytest.raises(PassError):
        run(NOTHING, Explode(), instrument=Timing(tmp_path))
    assert [r["name"] for r in json.loads((tmp_path / "timing.json").read_text())] == ["nothing"]
    assert set(threading.enumerate()) <= threads


# -- numerics ------------------------------------------------------------------------------------------------


def test_a_pass_that_lies_about_its_numerics_is_caught() -> None:
    program = tiny()
    before = render(program)
    with pytest.raises(PassError) as error:
        run(scale(1.01, numerics=close(1e-3)), instrument=CheckNumerics(), program=program)
    assert str(error.value) == ("scale declares close numerics (≤ 0.001) but moved the outputs by 1.00e-02 relative.")
    assert render(program) == before


def test_the_tolerance_is_relative_to_the_largest_output() -> None:
    checks = CheckNumerics()
    run(
        NOTHING, scale(1.0, numerics=EXACT), scale(1.01, numerics=close(0.0101)), scale(5.0, numerics=LOSSY),
        instrument=checks,
    )  # fmt: skip
    assert checks.errors == {"#1 nothing": 0.0, "#2 scale": 0.0, "#3 scale": pytest.approx(0.01, rel=1e-4)}
    with pytest.raises(PassError):
        run(scale(1.01, numerics=close(0.0099)), instrument=CheckNumerics())
    with pytest.raises(PassError, match="exact"):
        run(scale(1 + 2**-23, numerics=EXACT), instrument=CheckNumerics())


def test_a_lie_at_the_last_timestep_alone_is_caught() -> None:
    """As of a folded table whose rows are out of order: some row is right by chance."""

    def late(program: Program, ctx: Context) -> None:
        output = next(n for n in program.step.nodes if n.op == "output")
        time = next(n for n in program.step.nodes if n.name == "timestep")
        early = program.insert(output, torch.ops.aten.lt.Scalar, (time, 5))
        shape = program.insert(output, torch.ops.aten.view.default, (early, [-1, 1, 1, 1]))
        output.args = (program.insert(output, torch.ops.aten.add.Tensor, (output.args[0], shape)),)

    program = tiny()
    program.set_table(Schedule, {"schedule": Schedule((900.0, 500.0, 4.0))})
    with pytest.raises(PassError, match="late declares exact numerics"):
        run(make_pass("late", late), instrument=CheckNumerics(), program=program)
    program.set_table(Schedule, {"schedule": Schedule((900.0, 500.0, 5.0))})
    run(make_pass("late", late), instrument=CheckNumerics(), program=program)


def test_a_program_without_weights_is_not_run() -> None:
    program = tiny()
    program.tensors = {name: tensor.to("meta") for name, tensor in program.tensors.items()}
    checks = CheckNumerics()
    run(scale(2.0), instrument=checks, program=program)
    assert checks.errors == {}


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("want", "got", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([0.0, -0.0], [-0.0, 0.0], 0.0),
        ([0.0], [1e-30], INF),
        ([NAN, 2.0], [NAN, 1.0], 0.5),
        ([INF, 2.0], [INF, 1.0], 0.5),
        ([1.0], [NAN], INF),
        ([NAN], [1.0], INF),
        ([1.0], [INF], INF),
        ([1.0, 2.0], [1.0], INF),
        ([1.0, 1.0], [[1.0, 1.0]], INF),
        ([], [], 0.0),
        ([True], [False], 1.0),
        ([2], [1], 0.5),
        ([2], [2.0], INF),
    ],
)
def test_relative_error(want: list[float], got: list[float], error: float) -> None:
    assert relative_error(torch.tensor(want), torch.tensor(got)) == error


def test_example_calls_are_of_the_inputs_own_types() -> None:
    call = example_call(tiny(), seed=1, timestep=3)
    assert call["timestep"].tolist() == [3, 3]
    assert call["timestep"].dtype is torch.int64
    assert call["sample"].shape == (2, 2, 4, 4)
    assert torch.equal(call["sample"], example_call(tiny(), seed=1)["sample"])
    assert not torch.equal(call["sample"], example_call(tiny(), seed=2)["sample"])


# -- reproducer ----------------------------------------------------------------------------------------------


def test_a_reproducer_replays_the_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "a directory"
    ctx = Context(schedule=SamplingSchedule((9.0, 5.0)), seed=3)
    pipeline = Pipeline((scale(2.0), Explode("a reason"), NOTHING))
    with pytest.raises(PassError) as first:
        pipeline.run(tiny(), ctx, [Reproducer(directory)])

    command = shlex.split((directory / "command.txt").read_text())
    assert first.value.notes[-1] == f"replay it with: {shlex.join(command)}"
    assert command[:2] == ["tfqc", "opt"]
    options = dict(zip(command[3::2], command[4::2], strict=True))
    assert options.keys() == {"-p", "--seed", "--schedule"}
    assert options["--seed"] == "3"
    assert SamplingSchedule.from_json(Path(options["--schedule"]).read_text()) == ctx.schedule

    monkeypatch.setitem(registry.PASSES, "explode", "tests.tiny:Explode")
    registry.entries.cache_clear()
    try:
        replay = Pipeline.parse(Path(options["-p"]).read_text())
        before = load_program(Path(command[2]))
        with pytest.raises(PassError) as second:
            replay.run(before, ctx)
    finally:
        registry.entries.cache_clear()
        find_pass.cache_clear()
    assert str(first.value) == "Pass #2 explode failed: KeyError: 'a reason'"
    assert str(second.value) == "Pass #1 explode failed: KeyError: 'a reason'"
    assert render(before) == render(Pipeline((scale(2.0),)).run(tiny()))
    assert torch.equal(
        before(**example_call(before))[0], Pipeline((scale(2.0),)).run(tiny())(**example_call(before))[0]
    )
    assert (directory / "error.txt").read_text() == "KeyError: 'a reason'\n"
    assert (directory / "pipeline.txt").read_text() == 'scale,explode{why="a reason"},nothing\n'


def test_a_later_reproducer_replaces_an_earlier_one(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline((Explode(),)).run(tiny(), Context(schedule=SamplingSchedule((9.0, 5.0))), [Reproducer(tmp_path)])
    assert (tmp_path / "schedule.json").exists()
    with pytest.raises(PassError):
        run(Explode(), instrument=Reproducer(tmp_path))
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        ".written.json", "before.ir", "before.safetensors", "command.txt", "error.txt", "pass.txt", "pipeline.txt",
    ]  # fmt: skip


def test_a_run_that_does_not_fail_writes_no_reproducer(tmp_path: Path) -> None:
    run(NOTHING, instrument=Reproducer(tmp_path / "reproducer"))
    assert not (tmp_path / "reproducer").exists()
