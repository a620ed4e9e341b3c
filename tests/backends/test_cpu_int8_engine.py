"""The run time of cpu-int8: shapes, threads, memory, and what happens where kernels cannot be built."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

from tests.backends.engines import BATCHES, built, chosen_isa, differ, made
from tests.cli.conftest import FEW, TINY, Tfqc
from tests.cli.conftest import tfqc as tfqc
from tests.helpers import first
from tests.lowered import EXACT, PER_TOKEN, STEPS, example, parts
from tests.models import odd_names
from tests.subjects import Subject, Subjects
from tfqc.backends.cpu_int8.runtime.engine import Engine
from tfqc.driver import compile, load
from tfqc.errors import TfqcError
from tfqc.frontend import capture
from tfqc.passing.pipeline import Pipeline


@pytest.mark.parametrize("target", [EXACT, "cpu-int8"])
def test_batches(target: str, tmp_path: Path) -> None:
    its = parts()
    program, loaded = made(its, tmp_path / "out", target)
    assert loaded.isa == chosen_isa()
    for timesteps in (*BATCHES, *BATCHES):
        call = its.call(timesteps)
        assert differ(program(**call), loaded(**call)) < 0.1
    assert len(loaded._recordings) == 3


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
    assert len(loaded._recordings) == (1 if size == 6 else 2)


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
@pytest.mark.parametrize("model", ["unet-sd", "unet-sdxl"])  # tables of the model's own, and of a request
def test_unknown_timesteps_find_room(model: str, subject: Subjects, tmp_path: Path) -> None:
    """Schedules stay for as long as tables have spare rows, which are doubled when they end."""
    its = subject(model)
    program, loaded = made(its, tmp_path / "out")
    record, recorded = loaded._record, list[float]()
    call = its.call([its.timesteps[0]])
    loaded._record = lambda values: recorded.append(t) or record(values)  # type: ignore[method-assign, func-returns-value]
    for t in (its.timesteps[0], *map(float, range(100, 130))):
        call["timestep"] = torch.tensor([int(t)])
        got = first(loaded(**call))
        if t in (its.timesteps[0], 100, 103, 104, 129):
            assert differ(program(**call), got) < 0.1
    assert recorded == [its.timesteps[0], 103, 111, 127]  # the first is none of the four either


class Frames(nn.Module):
    """A convolution that torch runs, with a range for each timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Conv3d(2, 4, 1), nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.space(x) + self.time(t.float()[:, None] / 1000)[:, :, None, None, None]


@built
def test_unknown_timesteps_of_what_torch_runs(tmp_path: Path) -> None:
    example_inputs = {"x": torch.randn(2, 2, 3, 4, 4), "t": torch.tensor([7, 7])}
    calls = [{**example_inputs, "t": torch.full((2,), t)} for t in (900, 500)]
    model = Frames().requires_grad_(False)
    artifact = compile(model, "cpu-int8", schedule=[900.0, 500.0], calibration=calls, example_inputs=example_inputs)
    loaded = load(artifact.save(tmp_path / "out"))
    for t in (900, 100, 110, 120, 130, 500):
        call = {**example_inputs, "t": torch.full((2,), t)}
        assert differ(model(**call), loaded(**call)) < 0.1


@built
def test_recordings_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "MAX_RECORDINGS", 2)
    its = parts()
    _, loaded = made(its, tmp_path / "out")
    want = [first(loaded(**its.call([750.0] * b))) for b in (1, 2, 3, 4)]
    assert len(loaded._recordings) == 2
    for batch in (1, 4, 2, 3):
        assert torch.equal(first(loaded(**its.call([750.0] * batch))), want[batch - 1])
        assert len(loaded._recordings) == 2


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
    assert len(loaded._recordings) == 2


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
    assert len(loaded._recordings) == 6


# -- only real kernels --------------------------------------------------------------------------------------------


def test_require_real_on_the_command_line(tfqc: Tfqc, tmp_path: Path) -> None:
    given = ("compile", TINY, *FEW, "--target", "cpu-int8")
    done = tfqc(*given, "--require-real", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    (tmp_path / "plan.txt").write_text("conv_in weight -> float\n")
    refused = tfqc(*given, "--plan", tmp_path / "plan.txt", "--require-real", "--out", tmp_path / "no")
    assert refused.code == 1 and not (tmp_path / "no").exists()
    assert "cpu-int8 has no kernel for 1 product of" in refused.err
    assert "(conv_in" in refused.err and "planned as float" in refused.err
    # What torch runs beside products is no reason to refuse: the block of the timestep has a sinusoid.
    allowed = tfqc(*given, "--strategy", "tib", "--require-real", "--out", tmp_path / "yes")
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
        with pytest.raises(TfqcError, match=r"cpu-int8 has no kernel for \d products? of Dilated") as caught:
            run()
        notes = "\n".join(caught.value.__notes__)
        assert "runs in torch: its dilation is [2, 2]" in notes
        assert "(middle, " in notes
