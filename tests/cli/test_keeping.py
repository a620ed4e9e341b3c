"""The working directory beside an output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Tfqc
from tests.tiny import tiny
from tfqc.cli.keeping import kept_work
from tfqc.ir.store import save_program

BATCH = "trajectory-0a-0000.safetensors"


def test_it_is_removed_when_the_command_is_done_and_private_before(tmp_path: Path) -> None:
    with kept_work(tmp_path / "out.work") as work:
        (work / BATCH).write_text("")
        assert work.stat().st_mode & 0o777 == 0o700
    assert not work.exists()


def test_commands_that_share_it_do_not_remove_it_under_each_other(tmp_path: Path) -> None:
    with kept_work(tmp_path / "out.work") as work:
        (work / BATCH).write_text("")
        with kept_work(tmp_path / "out.work"):
            pass
        part = work / ".trajectory-0a-0001.safetensors.part1-01234567"
        part.write_text("of the first, which writes it")
        with pytest.raises(KeyError) as error, kept_work(tmp_path / "out.work"):
            raise KeyError
        assert error.value.__notes__ == [
            f"Kept 1 finished batch of calibration trajectories in {work}: the same command goes on from there."
        ]
        assert (work / BATCH).exists() and part.exists()
    assert not work.exists()


def test_what_is_removed_meanwhile_is_no_error(tmp_path: Path) -> None:
    with kept_work(tmp_path / "out.work") as work:
        shutil.rmtree(work)
    with pytest.raises(KeyError) as error, kept_work(tmp_path / "out.work") as work:
        shutil.rmtree(work)
        raise KeyError
    assert not hasattr(error.value, "__notes__")


def test_what_a_user_puts_there_stays(tmp_path: Path) -> None:
    with kept_work(tmp_path / "out.work") as work:
        (work / "notes.txt").write_text("mine")
    assert (work / "notes.txt").read_text() == "mine"


def test_opt_without_an_output_writes_nothing_beside_its_input(tfqc: Tfqc, tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    (tmp_path / "p.ir.work").mkdir()
    (tmp_path / "p.ir.work" / BATCH).write_text("of another command")
    assert tfqc("opt", tmp_path / "p.ir", "-p", "normalize").code == 0
    tmp_path.chmod(0o500)
    try:
        assert tfqc("opt", tmp_path / "p.ir", "-p", "normalize").code == 0
    finally:
        tmp_path.chmod(0o700)
    assert (tmp_path / "p.ir.work" / BATCH).exists()
