"""Programs on disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from tests.tiny import INPUTS, tiny
from tfqc.backends.cpu_int8.runtime.memory import load_aligned
from tfqc.errors import IRError, TfqcError
from tfqc.ir.program import Program
from tfqc.ir.render import render
from tfqc.ir.store import load_program, save_program
from tfqc.ir.types import STORABLE
from tfqc.ir.verify import verify


def meta(program: Program) -> Program:
    program.tensors = {name: tensor.to("meta") for name, tensor in program.tensors.items()}
    return program


def test_a_program_comes_back_with_bit_identical_outputs(tmp_path: Path) -> None:
    program = tiny()
    save_program(program, tmp_path / "new" / "a.b.ir")
    loaded = load_program(tmp_path / "new" / "a.b.ir")
    assert render(loaded) == render(program)
    assert torch.equal(loaded(**INPUTS)[0], program(**INPUTS)[0])
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == ["a.b.ir", "a.b.safetensors"]


def test_without_weights_there_is_only_text(tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    save_program(meta(tiny()), tmp_path / "p.ir")  # the old weights must not come back with the new program
    assert [f.name for f in tmp_path.iterdir()] == ["p.ir"]
    loaded = load_program(tmp_path / "p.ir")
    assert not loaded.has_weights
    assert render(loaded) == render(tiny())


def test_tensors_that_share_storage_or_are_not_contiguous_are_stored_apart(tmp_path: Path) -> None:
    program = tiny()
    base = torch.arange(64.0)
    views = {
        "conv_in.bias": base[:4], "conv_out.bias": base[2:4], "time.0.bias": base[::8],
        "time.2.weight": base[:32].reshape(8, 4).T, "time.2.bias": base[:4],
    }  # fmt: skip
    program.tensors |= views
    save_program(program, tmp_path / "p.ir")
    stored = load_file(tmp_path / "p.safetensors")
    assert all(torch.equal(stored[name], view) for name, view in views.items())
    assert (tmp_path / "p.safetensors").stat().st_size < 4000  # no view drags its base along


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(IRError, match=r"There is no program .*absent\.ir"):
        load_program(tmp_path / "absent.ir")


@pytest.mark.parametrize("keep", [0, 7, 200])
def test_truncated_weights_are_refused(tmp_path: Path, keep: int) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    weights = tmp_path / "p.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(IRError, match=r"p\.safetensors is no whole safetensors file"):
        load_program(tmp_path / "p.ir")


def test_weights_of_another_program_are_refused(tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    other = tiny()
    other.tensors["conv_in.bias"] = torch.zeros(5)
    save_program(other, tmp_path / "q.ir")
    (tmp_path / "q.safetensors").rename(tmp_path / "p.safetensors")
    with pytest.raises(IRError, match=r"@conv_in\.bias is declared 4xf32, stored 5xf32"):
        load_program(tmp_path / "p.ir")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.ir").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IRError, match="is no text"):
        load_program(tmp_path / "p.ir")


def test_a_failed_save_leaves_the_old_program(tmp_path: Path) -> None:
    save_program(tiny(), tmp_path / "p.ir")
    before = (tmp_path / "p.ir").read_text()
    broken = tiny()
    del broken.types["silu"]
    with pytest.raises(KeyError):
        save_program(broken, tmp_path / "p.ir")
    assert (tmp_path / "p.ir").read_text() == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p.ir", "p.safetensors"]


@pytest.mark.parametrize("program", [tiny(), meta(tiny())])
def test_tensors_of_somebody_else_are_not_touched(program: Program, tmp_path: Path) -> None:
    (tmp_path / "p.safetensors").write_bytes(theirs := safetensors.torch.save({"mine": torch.ones(2)}))
    with pytest.raises(IRError, match=r"p\.safetensors stands beside p\.ir, and is no program's: choose another name"):
        save_program(program, tmp_path / "p.ir")
    assert [f.name for f in tmp_path.iterdir()] == ["p.safetensors"]
    assert (tmp_path / "p.safetensors").read_bytes() == theirs
    with pytest.raises(IRError, match=r"is no name for a program"):
        save_program(program, tmp_path / "p.safetensors")


@pytest.mark.parametrize("theirs", [b"notes", b"tfqc-irrigation", b"\xff\xfe\x00"])
def test_a_file_that_is_no_program_is_not_replaced(theirs: bytes, tmp_path: Path) -> None:
    (tmp_path / "n.txt").write_bytes(theirs)
    with pytest.raises(IRError, match=r"n\.txt is no program, so it is not replaced: choose another name"):
        save_program(tiny(), tmp_path / "n.txt")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("n.txt", theirs)]
    (tmp_path / "n.txt").unlink()
    (tmp_path / "n.txt").mkdir()
    with pytest.raises(IRError, match=r"n\.txt is no program"):
        save_program(tiny(), tmp_path / "n.txt")


@pytest.mark.parametrize("stands", ["", "tfqc-ir 1\nhalf a prog"])
def test_an_empty_file_and_a_program_are_replaced(stands: str, tmp_path: Path) -> None:
    (tmp_path / "p.ir").write_text(stands)
    save_program(tiny(), tmp_path / "p.ir")
    assert (tmp_path / "p.ir").read_text() == render(tiny())


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "p.ir").symlink_to(tmp_path / "disk" / "q.ir")
    save_program(tiny(), tmp_path / "p.ir")
    assert (tmp_path / "p.ir").is_symlink() and (tmp_path / "disk" / "q.ir").read_text() == render(tiny())


@pytest.mark.parametrize("what", ["directory", "pipe"])
def test_what_is_no_file_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "p.ir").mkdir() if what == "directory" else os.mkfifo(tmp_path / "p.ir")
    with pytest.raises(IRError, match=r"p\.ir is no file"):
        load_program(tmp_path / "p.ir")


@pytest.mark.filterwarnings("ignore")  # torch's own, of dtypes that are on their way out
@pytest.mark.parametrize("dtype", sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str))
def test_every_dtype_is_kept_or_refused_before_anything_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    program = tiny()
    program.tensors["extra"] = torch.empty(3, dtype=dtype)
    if dtype not in STORABLE:
        with pytest.raises(TfqcError, match=rf"@extra is {dtype}, which no safetensors file holds"):
            verify(program)
        with pytest.raises(IRError, match=r"tensor|dtype"):
            save_program(program, tmp_path / "p.ir")
        assert not list(tmp_path.iterdir())
        return
    save_program(program, tmp_path / "p.ir")
    read = load_program(tmp_path / "p.ir").tensors["extra"]
    assert read.dtype == dtype
    assert torch.equal(read.view(torch.uint8), program.tensors["extra"].view(torch.uint8))
    aligned = load_aligned(tmp_path / "p.safetensors")["extra"]
    assert torch.equal(aligned.view(torch.uint8), read.view(torch.uint8))
