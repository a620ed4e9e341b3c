"""Building kernels: once, by several at once, and where it cannot be done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backends.engines import BATCHES, ODD, built, chosen_isa, differ, made, save
from tests.lowered import finished, parts
from tests.subjects import Subject, of_example
from tfqc.backends.cpu_int8.runtime import build as building
from tfqc.backends.cpu_int8.runtime import engine
from tfqc.backends.cpu_int8.runtime.build import ISAS, BuildError, best_isa, build, runs_here
from tfqc.backends.cpu_int8.runtime.engine import Engine
from tfqc.driver import load
from tfqc.errors import ArtifactError


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def held_by_torch(its: Subject, out: Path, message: str) -> Engine:
    """A model that warns when it is loaded, and computes with torch what the program says."""
    program = finished(its)
    with pytest.warns(UserWarning, match=message) as caught:
        loaded = load(save(program, out))
    assert isinstance(loaded, Engine)
    assert len(caught) == 1 and str(caught[0].message).endswith("The model runs with torch instead, slowly.")
    assert loaded.isa == "torch"
    with torch.no_grad():
        for timesteps in BATCHES:
            call = its.call(timesteps)
            assert differ(program(**call), loaded(**call)) < 1e-5
    return loaded


@pytest.mark.skipif(best_isa() is None or shutil.which("g++") is None, reason="no kernels here")
def test_debugging_the_command_line_leaves_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = save(finished(parts()), tmp_path / "out")
    monkeypatch.setenv("TFQC_DEBUG", "1")
    loaded = load(out)
    assert loaded.isa == chosen_isa()  # type: ignore[union-attr]


@pytest.mark.parametrize("value", ["1", "bound"])
def test_kernel_checks_of_no_known_kind(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFQC_KERNEL_CHECKS", value)
    held_by_torch(parts(), tmp_path / "out", f"TFQC_KERNEL_CHECKS={value} is none of bounds, sanitize")


def test_without_a_compiler(no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(engine, "best_isa", lambda: "avx2")
    monkeypatch.setattr(engine, "runs_here", lambda isa: True)
    its = parts()
    without = held_by_torch(its, tmp_path / "out", r"no g\+\+ \(nor what CXX names\)")
    assert not list(no_cache.rglob("*.so"))
    monkeypatch.undo()
    if best_isa() is not None and shutil.which("g++"):
        loaded = load(tmp_path / "out")
        assert loaded.isa == chosen_isa()  # type: ignore[union-attr]
        call = its.call([750.0, 0.0])
        assert differ(without(**call), loaded(**call)) < 0.1


def test_a_compiler_that_refuses(no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails, and a program that is no compiler at all."""
    monkeypatch.setattr(engine, "best_isa", lambda: "avx2")
    monkeypatch.setattr(engine, "runs_here", lambda isa: True)
    its = of_example("odd", ODD)
    refuses = '[ "$1" = --version ] && echo 1 && exit 0; echo nonsense >&2; exit 1'
    for name, text in (("refuses", refuses), ("false", "exit 1")):
        compiler = tmp_path / name
        compiler.write_text(f"#!/bin/sh\n{text}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        held_by_torch(its, tmp_path / "out", f"{name} refuses|{name} is no compiler")
    assert not list(no_cache.rglob("*.so"))


def no_more_than(flag: str, directory: Path) -> str:
    """A compiler that does not know a flag, with an argument that it needs."""
    compiler = directory / "old"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = g++ ] || exit 3\ncase "$*" in *{flag}*) echo "unknown {flag}" >&2; exit 1;; esac\n"$@"\n'
    )
    compiler.chmod(0o755)
    return f"'{compiler}' g++"


@built
@pytest.mark.parametrize("flag, lesser", [("-mamx-int8", "avx512_vnni"), ("-mavx512vnni", "avx2")])
def test_an_old_compiler(
    flag: str, lesser: str, no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it can build for is used, and said."""
    isa = ISAS[ISAS.index(lesser) - 1]
    if not runs_here(isa):
        pytest.skip(f"no {isa} here")
    monkeypatch.setenv("CXX", no_more_than(flag, tmp_path))
    monkeypatch.setenv("TFQC_ISA", isa)
    out = save(finished(of_example("odd", ODD)), tmp_path / "out")
    with pytest.warns(UserWarning, match=rf"refuses the kernels: unknown {flag} The kernels use {lesser} instead"):
        assert load(out).isa == lesser  # type: ignore[union-attr]


@built
def test_a_compiler_with_arguments(no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", no_more_than("-nothing", tmp_path))
    assert build('extern "C" int answer() { return 5; }', "avx2").answer() == 5
    for wrong, why in (
        ("'", "CXX is no command"),
        (str(tmp_path), r"There is no g\+\+"),
        ("false", "is no compiler"),
    ):
        monkeypatch.setenv("CXX", wrong)
        with pytest.raises(BuildError, match=why):
            build('extern "C" int answer() { return 5; }', "avx2")
    (tmp_path / "text").write_text("neither a script nor a program")
    (tmp_path / "text").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "text"))
    with pytest.raises(BuildError, match="is no compiler"):
        build('extern "C" int answer() { return 5; }', "avx2")
    monkeypatch.setenv("CXX", "")
    assert build('extern "C" int answer() { return 5; }', "avx2").answer() == 5


@built
@pytest.mark.parametrize("left", [0, 100])
def test_a_broken_library_is_built_again(left: int, no_cache: Path) -> None:
    text, isa = 'extern "C" int answer() { return 13; }', best_isa()
    assert isa is not None
    script = f"from tfqc.backends.cpu_int8.runtime.build import build; build({text!r}, {isa!r})"
    subprocess.run([sys.executable, "-c", script], check=True)  # this process would find it open
    (library,) = no_cache.rglob("*.so")
    whole = library.read_bytes()
    library.write_bytes(whole[:left])
    assert build(text, isa).answer() == 13
    assert library.stat().st_size == len(whole)


@built
def test_a_library_that_cannot_be_loaded(no_cache: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot be loaded: .*undefined symbol: missing\."):
        build('extern "C" int missing(); extern "C" int answer() { return missing(); }', "avx2")
    assert not list(no_cache.rglob("*.so"))


def test_amx_needs_a_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Virtual machines show AMX and do not always let it be used: else the first tile would end the process."""
    monkeypatch.setattr(building, "cpu_flags", lambda: frozenset(set().union(*building._NEEDS.values())))
    monkeypatch.setattr(building, "amx_is_granted", lambda: False)
    monkeypatch.delenv("TFQC_ISA", raising=False)
    assert best_isa() == "avx512_vnni" and not runs_here("amx")
    out = save(finished(of_example("odd", ODD)), tmp_path / "out", "cpu-int8{isa=amx}")
    with pytest.warns(UserWarning, match=r"does not let the process use the registers of AMX"):
        assert load(out).isa == "torch"  # type: ignore[union-attr]


def test_where_linux_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "Path", lambda name: tmp_path / "absent")
    for capability, best in (("AVX512", "avx2"), ("AVX2", "avx2"), ("DEFAULT", None)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda its=capability: its)
        building.cpu_flags.cache_clear()
        assert best_isa() == best
    building.cpu_flags.cache_clear()


@pytest.mark.parametrize("wanted", ["auto", "avx2", "amx"])
def test_a_cpu_without_the_instructions(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cpu_flags", lambda: frozenset({"fma"}))
    monkeypatch.setenv("TFQC_ISA", wanted)
    assert best_isa() is None and not any(map(runs_here, ISAS))
    held_by_torch(of_example("odd", ODD), tmp_path / "out", rf"This CPU has not the instructions .*\({wanted}\)")


def test_an_artifact_for_another_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.delenv("TFQC_ISA", raising=False)
    assert best_isa() == "avx2"
    out = save(finished(of_example("odd", ODD)), tmp_path / "out", "cpu-int8{isa=amx}")
    with pytest.warns(UserWarning, match=r"This CPU has not the instructions .*\(amx\)"):
        assert load(out).isa == "torch"  # type: ignore[union-attr]


@built
def test_the_environment_chooses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = of_example("odd", ODD)
    best = best_isa()
    assert best is not None
    monkeypatch.setenv("TFQC_ISA", best)
    program, loaded = made(its, tmp_path / "out")
    assert loaded.isa == best
    call = its.call([750.0])
    assert differ(program(**call), loaded(**call)) < 0.1
    monkeypatch.setenv("TFQC_ISA", "avx1024")
    held_by_torch(its, tmp_path / "out", r"\(avx1024\)")


@built
def test_two_processes_build_at_once(no_cache: Path) -> None:
    isa = best_isa()
    script = f"""
import ctypes, sys
from tfqc.backends.cpu_int8.runtime.build import build
sys.stdin.read(1)
print(build('extern "C" int answer() {{ return 42; }}', {isa!r}).answer())
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in processes:  # both are let go at once
        assert process.stdin is not None
        process.stdin.write("x")
        process.stdin.close()
        process.stdin = None
    assert [process.communicate(timeout=120)[0] for process in processes] == ["42\n", "42\n"]
    assert [path.suffix for path in no_cache.rglob("[!.]*") if path.is_file()] == [".so"]
    assert len(list((no_cache / "tfqc" / "kernels").iterdir())) == 1  # nothing else is left


@built
def test_built_once(no_cache: Path) -> None:
    isa = best_isa()
    assert isa is not None
    text = 'extern "C" int answer() { return 7; }'
    assert build(text, isa).answer() == 7
    (library,) = no_cache.rglob("*.so")
    written = library.stat().st_mtime_ns
    assert build(text, isa).answer() == 7
    assert library.stat().st_mtime_ns == written
    with pytest.raises(BuildError, match="refuses the kernels"):
        build("int answer() {", isa)
    assert len(list(library.parent.iterdir())) == 1


def test_changed_kernels_are_refused(tmp_path: Path) -> None:
    out = save(finished(of_example("odd", ODD)), tmp_path / "out")
    assert set(json.loads((out / "manifest.json").read_text())["files"]) == {
        "kernels.cpp", "model.py", "program.ir", "time.safetensors", "weights.safetensors"
    }  # fmt: skip
    with (out / "kernels.cpp").open("a") as file:
        file.write("// mine\n")
    with pytest.raises(ArtifactError, match=r"kernels.cpp has been changed since it was written"):
        load(out)
    (out / "kernels.cpp").unlink()
    with pytest.raises(ArtifactError, match=r"'kernels.cpp' is missing"):
        load(out)


@built
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    isa = best_isa()
    assert isa is not None
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert build('extern "C" int answer() { return 11; }', isa).answer() == 11
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
