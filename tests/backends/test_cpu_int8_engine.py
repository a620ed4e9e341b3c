"""The run time of cpu-int8: shapes, threads, memory, and what happens where kernels cannot be built."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from tests.cli.conftest import FEW, TINY, Tfqc
from tests.cli.conftest import tfqc as tfqc
from tests.helpers import first
from tests.lowered import EXACT, PER_TOKEN, STEPS, example, finished, parts
from tests.models import odd_names
from tests.subjects import Subject, Subjects, of_example
from tfqc.backends.cpu_int8 import build as building
from tfqc.backends.cpu_int8 import engine
from tfqc.backends.cpu_int8.build import ISAS, BuildError, best_isa, build, runs_here
from tfqc.backends.cpu_int8.engine import Engine
from tfqc.driver import compile, load
from tfqc.errors import ArtifactError, TfqcError
from tfqc.frontend import capture
from tfqc.ir.program import Program
from tfqc.pipeline import Pipeline
from tfqc.target import Target

BATCHES = ([750.0], [500.0, 500.0], [0.0, 750.0, 250.0], [33.0])
built = pytest.mark.skipif(
    best_isa() is None or shutil.which("g++") is None, reason="no CPU or no compiler for kernels"
)


def save(program: Program, out: Path, target: str = "cpu-int8") -> Path:
    """The artifact of a lowered program."""
    parsed = Target.parse(target)
    artifact = parsed.backend.emit(program, parsed.options)
    artifact.facts["backend"] = parsed.name
    return artifact.save(out)


def made(its: Subject, out: Path, target: str = EXACT, **recipe: str) -> tuple[Program, Engine]:
    """A lowered program and its engine."""
    program = finished(its, target, **recipe)
    loaded = load(save(program, out, target))
    assert isinstance(loaded, Engine)
    return program, loaded


def differ(want: Any, got: Any) -> float:
    """‖a − b‖ / ‖a‖. One code that rounding turns the other way moves small models by percents."""
    a, b = first(want), first(got)
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).norm() / a.norm())


# -- calls --------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("target", [EXACT, "cpu-int8"])
def test_batches(target: str, tmp_path: Path) -> None:
    its = parts()
    program, loaded = made(its, tmp_path / "out", target)
    assert loaded.isa == best_isa()
    for timesteps in (*BATCHES, *BATCHES):
        call = its.call(timesteps)
        assert differ(program(**call), loaded(**call)) < 0.1
    assert len(loaded._schedules) == 3


class Vectors(nn.Module):
    """A sample without space or tokens; and an input that has the name of a helper of `model.py`."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inner, self.outer = nn.Linear(1, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, k: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return self.outer(F.relu(self.inner(k) + self.time(t.float()[:, None] / 1000))) + w


def vectors() -> tuple[nn.Module, dict[str, Tensor]]:
    """Tokens of very different sizes."""
    model, inputs = example(Vectors, 6)()
    return model, {"k": inputs["x"] * torch.tensor([[1.0], [40.0]]), "t": inputs["time"], "w": torch.ones(2, 6)}


@built
def test_each_vector_has_its_own_range(tmp_path: Path) -> None:
    """Quantized by the token, a batch of vectors has a scale for each; a row of the schedule that is a residual serves
    them all; and inputs may be called k, w and t."""
    model, inputs = vectors()
    program = capture(model, inputs, roles={"k": "sample", "t": "time", "w": "request"})
    its = Subject("vectors", model, inputs, Pipeline.parse("normalize,discover-tib").run(program))
    program, loaded = made(its, tmp_path / "out", EXACT, activations=PER_TOKEN)
    assert "def step(k_: Any, w_: Any, t: Any, /, *, k: Tensor, w: Tensor" in (tmp_path / "out/model.py").read_text()
    for timesteps in ([750.0, 0.0], [500.0] * 3, [250.0]):
        call = its.call(timesteps)
        assert differ(program(**call), loaded(**call)) < 1e-5
        assert differ(its.reference(call), loaded(**call)) < 0.02


@built
@pytest.mark.parametrize("size", [6, 8])
def test_another_resolution(size: int, tmp_path: Path) -> None:
    """Of a model that was captured with height and width as symbols; each shape has a schedule of its own."""
    model, inputs = odd_names()
    roles = {"a": "sample", "b": "time"}
    program = capture(model, inputs, roles=roles, dynamic={"a": {2: "H", 3: "W"}})
    its = Subject("odd-sizes", model, inputs, Pipeline.parse("normalize,discover-tib").run(program))
    program, loaded = made(its, tmp_path / "out")
    for height in (6, size):
        call = its.call([750.0, 0.0], a=torch.randn(2, 2, height, size, generator=torch.Generator().manual_seed(1)))
        result = loaded(**call)
        assert first(result).shape == (2, 2, height, size)
        assert differ(program(**call), result) < 0.1
    assert len(loaded._schedules) == (1 if size == 6 else 2)


@built
def test_two_models_in_turn(subject: Subjects, tmp_path: Path) -> None:
    one, other = parts(), subject("dit")
    _, a = made(one, tmp_path / "a", "cpu-int8")
    _, b = made(other, tmp_path / "b", "cpu-int8")
    calls = [(one.call(t), other.call(t)) for t in BATCHES[:2]]
    alone = [first(a(**x)) for x, _ in calls], [first(b(**y)) for _, y in calls]
    for _ in range(2):
        for i, (x, y) in enumerate(calls):
            assert torch.equal(first(a(**x)), alone[0][i])
            assert torch.equal(first(b(**y)), alone[1][i])


@built
def test_results_are_the_callers_own(tmp_path: Path) -> None:
    its = parts()
    _, loaded = made(its, tmp_path / "out")
    call = its.call([750.0, 0.0])
    before = first(loaded(**call))
    kept = before.clone()
    changed = first(loaded(**its.call([500.0, 0.0])))
    assert torch.equal(before, kept) and not torch.equal(changed, kept)
    before.zero_()
    assert torch.equal(first(loaded(**call)), kept)
    call["x"].mul_(-1)  # in place: the sample is read at every call
    assert not torch.equal(first(loaded(**call)), kept)


@built
def test_schedules_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "MAX_SCHEDULES", 2)
    its = parts()
    _, loaded = made(its, tmp_path / "out")
    want = [first(loaded(**its.call([750.0] * b))) for b in (1, 2, 3, 4)]
    assert len(loaded._schedules) == 2
    for batch in (1, 4, 2, 3):
        assert torch.equal(first(loaded(**its.call([750.0] * batch))), want[batch - 1])
        assert len(loaded._schedules) == 2


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@built
def test_repeated_calls_do_not_grow(tmp_path: Path) -> None:
    its = parts()
    _, loaded = made(its, tmp_path / "out")
    calls = [its.call([t] * b) for t in STEPS for b in (1, 2)]
    with torch.no_grad():
        for step in range(200):
            if step == 30:
                before = resident()
            call = calls[step % len(calls)]
            loaded(**{**call, "x": call["x"].clone()})
    assert resident() - before < 4 << 20
    assert len(loaded._schedules) == 2


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set the number of threads for one test."""
    old = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(old)


@built
def test_threads(threads: Callable[[int], None], tmp_path: Path) -> None:
    its = parts()
    _, loaded = made(its, tmp_path / "out")
    results = []
    for count in (1, 2, 1):
        threads(count)
        results.append([first(loaded(**its.call(t))) for t in BATCHES[:3]])
    for one, two, again in zip(*results, strict=True):
        assert torch.equal(one, again)
        assert differ(one, two) < 0.1
    assert len(loaded._schedules) == 6


# -- building -----------------------------------------------------------------------------------------------------


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


def test_without_a_compiler(no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(engine, "best_isa", lambda: "avx2")
    monkeypatch.setattr(engine, "runs_here", lambda isa: True)
    its = parts()
    without = held_by_torch(its, tmp_path / "out", r"no g\+\+ \(nor what CXX names\)")
    assert not no_cache.exists()
    monkeypatch.undo()
    if best_isa() is not None and shutil.which("g++"):
        loaded = load(tmp_path / "out")
        assert loaded.isa == best_isa()  # type: ignore[union-attr]
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


class Odd(nn.Module):
    """The least that compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.conv, self.last = nn.Linear(1, 4), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.last(F.silu(self.conv(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None]))


ODD = example(Odd, 2, 4, 4)


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
from tfqc.backends.cpu_int8.build import build
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
    assert [path.suffix for path in no_cache.rglob("*") if path.is_file()] == [".so"]
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


# -- only real kernels --------------------------------------------------------------------------------------------


def test_require_real_on_the_command_line(tfqc: Tfqc, tmp_path: Path) -> None:
    given = ("compile", TINY, *FEW, "--target", "cpu-int8")
    done = tfqc(*given, "--require-real", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    refused = tfqc(*given, "--strategy", "tib", "--require-real", "--out", tmp_path / "no")
    assert refused.code == 1 and not (tmp_path / "no").exists()
    assert "cpu-int8 has no kernel for" in refused.err
    assert "runs in torch: there is no kernel for" in refused.err
    allowed = tfqc(*given, "--strategy", "tib", "--out", tmp_path / "yes")
    assert allowed.code == 0
    report = json.loads((tmp_path / "yes" / "manifest.json").read_text())["report"]
    assert any("runs in torch" in line for line in report)


class Dilated(nn.Module):
    """A convolution without a kernel between two with one."""

    def __init__(self, dilation: int = 2) -> None:
        super().__init__()
        self.time, self.conv_in, self.conv_out = nn.Linear(1, 4), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 2, 1)
        self.middle = nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv_in(x) + self.time(time.float()[:, None] / 1000)[:, :, None, None]
        return self.conv_out(F.silu(self.middle(h)))


def test_require_real() -> None:
    for dilation in (1, 2):
        model, inputs = example(functools.partial(Dilated, dilation), 2, 6, 6)()
        run = functools.partial(
            compile, model, "cpu-int8", example_inputs=inputs, schedule=DDIMScheduler(clip_sample=False), steps=3,
            calibration=2, require_real=True, roles={"x": "sample", "time": "time"},
        )  # fmt: skip
        if dilation == 1:
            assert "model.py" in run().texts
            continue
        with pytest.raises(TfqcError, match=r"cpu-int8 has no kernel for \d operations of Dilated") as caught:
            run()
        notes = "\n".join(caught.value.__notes__)
        assert "runs in torch: its dilation is [2, 2]" in notes
        assert "(middle, " in notes
