"""One run of the model for all that ask, sampled or replayed, here or elsewhere; nothing stale, nothing asked twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from torch import nn

from tests.subjects import Subject, Subjects, calibration, of_example
from tfqc.analysis.weighted import weighted_nodes
from tfqc.calibration.kept import Kept
from tfqc.calibration.observe import observe
from tfqc.calibration.observers.base import Observer, State
from tfqc.calibration.observers.moments import Moments
from tfqc.calibration.observers.ranges import Ranges
from tfqc.calibration.watch import Watch
from tfqc.errors import CalibrationError
from tfqc.ir.program import Program
from tfqc.ir.rows import Tib
from tfqc.passing import Context
from tfqc.passing.pipeline import Pipeline
from tfqc.sampling.schedule import SamplingSchedule

Wishes = dict[str, tuple[str, Observer[Any]]]


def context(its: Subject, workdir: Path | None, sampler: Any = DDIMScheduler, **others: Any) -> Context:
    schedule = SamplingSchedule.of(sampler(), 4)
    return Context(schedule=schedule, calibration=calibration(its, **others), workdir=workdir)


def wishes(program: Program, count: int = 4) -> Wishes:
    """Ranges of every input of a weighted node, and moments of the first ones outside the TIB."""
    nodes = [n for n in weighted_nodes(program) if n.name not in program.table(Tib)]
    ranges = {n.name: (n.all_input_nodes[0].name, Ranges(count, 20)) for n in weighted_nodes(program)}
    return ranges | {
        f"{n.name}.h": (n.all_input_nodes[0].name, Moments.of(program, n, count, looks=2)) for n in nodes[:4]
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Positions in the schedule of the network calls that were watched."""
    seen: list[int | None] = []
    plain = Watch.__call__

    def counted(self: Watch, **call: Any) -> Any:
        seen.append(self.at)
        return plain(self, **call)

    monkeypatch.setattr(Watch, "__call__", counted)
    return seen


def flat(results: dict[str, Any]) -> list[torch.Tensor]:
    def tensors(value: Any) -> list[torch.Tensor]:
        return [value] if isinstance(value, torch.Tensor) else [x for s in value.steps for x in (s.lo, s.hi, s.values)]

    return [tensor for value in results.values() for tensor in tensors(value)]


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def test_sampled_and_replayed_give_the_same_bytes(subject: Subjects, tmp_path: Path, calls: list[int | None]) -> None:
    its = subject("unet-sd")
    sampled, replayed = context(its, tmp_path), context(its, tmp_path)
    first = observe(its.program, wishes(its.program), sampled)
    assert calls == [0, 1, 2, 3] * 2  # 3 images in batches of 2: sampling them was the one run
    for path in tmp_path.glob("observed-*"):
        path.unlink()
    calls.clear()
    assert equal(first, observe(its.program, wishes(its.program), replayed))
    assert sampled.remarks == replayed.remarks  # they are written into the artifact
    assert calls == [0, 1, 2, 3] * 2
    calls.clear()
    assert equal(first, observe(its.program, wishes(its.program), context(its, tmp_path)))
    assert calls == []  # kept in the working directory
    moments = {k: v for k, v in wishes(its.program).items() if k.endswith(".h")}
    (kept,) = tmp_path.glob("observed-*")
    data = bytearray(kept.read_bytes())
    data[-100] ^= 1
    kept.write_bytes(data)
    assert equal({k: first[k] for k in moments}, observe(its.program, moments, context(its, tmp_path)))
    assert calls == [0, 3] * 2  # what was kept is broken; two steps were asked for


def test_a_sampler_that_visits_timesteps_twice(subject: Subjects, tmp_path: Path, calls: list[int | None]) -> None:
    its = subject("unet2d")
    first = observe(its.program, wishes(its.program), context(its, tmp_path, HeunDiscreteScheduler))
    visits = list(calls)
    assert visits == [0, 1, 1, 2, 2, 3, 3] * 2  # the second of each is where the first has led
    for path in tmp_path.glob("observed-*"):
        path.unlink()
    assert equal(first, observe(its.program, wishes(its.program), context(its, tmp_path, HeunDiscreteScheduler)))


def test_a_schedule_that_the_sampler_all_but_visits(subject: Subjects, tmp_path: Path, calls: list[int | None]) -> None:
    """Sampled first, then observed at the schedule's own timesteps."""
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    assert ctx.schedule is not None
    ctx.schedule = replace(ctx.schedule, timesteps=tuple(t * (1 + 1e-5) for t in ctx.schedule.timesteps))
    observe(its.program, wishes(its.program), ctx)
    assert calls == ([None] * 4 + [0, 1, 2, 3]) * 2


@pytest.mark.parametrize("kept", [True, False])
def test_passes_of_a_pipeline_share_a_run(
    kept: bool, subject: Subjects, tmp_path: Path, calls: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    its = subject("unet-sd")
    pipeline = Pipeline.parse("select-maintenance{strategy=tib},reconstruct-weights{steps=2},"
                              "calibrate-activations{scope=tib},calibrate-activations{mode=per-step}")  # fmt: skip
    ctx = context(its, tmp_path if kept else None)
    pipeline.rehearse(its.program, ctx)
    assert ctx.foreseen and not ctx.observed and calls == []
    shared = pipeline.run(its.program, ctx)
    assert calls == [0, 1, 2, 3] * 2
    assert not ctx.foreseen and not ctx.observed  # let go when the last had asked
    (line,) = (line for line in ctx.report if line.startswith("observed"))
    assert re.fullmatch(r"observed \d+ values over 4 steps of 3 images in one run, at most \d+ MiB of .*", line)
    calls.clear()
    alone = context(its, tmp_path / "alone")
    apart = pipeline.run(its.program, alone)  # without a rehearsal each asks for itself
    assert [c for c in calls if c in (1, 2)] == [1, 2] * 6 and calls.count(0) == 6
    assert sum(line.startswith("observed") for line in alone.report) == 3
    assert shared.tensors.keys() == apart.tensors.keys()
    assert all(torch.equal(shared.tensors[name], apart.tensors[name]) for name in shared.tensors)


def test_nothing_stale(subject: Subjects, tmp_path: Path, calls: list[int | None]) -> None:
    """What was foreseen of functions or weights that are others by now is no answer."""
    its = subject("unet2d")
    ctx = context(its, tmp_path)
    program = its.program
    name = next(n for n in weighted_nodes(program)).all_input_nodes[0].name
    other = list(weighted_nodes(program))[-1].all_input_nodes[0].name
    for _ in range(2):
        for value in (name, other):
            observe(program, {"x": (value, Ranges(4))}, replace(ctx, rehearsal=True))
    before = observe(program, {"x": (other, Ranges(4))}, ctx)
    assert len(calls) == 8
    observe(program, {"x": (name, Ranges(4))}, ctx)
    assert len(calls) == 8  # foreseen
    weight = next(k for k in program.tensors if k.startswith("conv_in"))
    program.tensors[weight] = program.tensors[weight] * 2
    after = observe(program, {"x": (other, Ranges(4))}, ctx)
    assert len(calls) == 16 and not equal(before, after)
    node = program.node(other)
    program.insert(node.next, torch.ops.aten.silu.default, (node,))
    observe(program, {"x": (name, Ranges(4))}, ctx)
    assert len(calls) == 24


class Elsewhere:
    """Runs the batches in another order, and hands on what came back as text and bytes."""

    def run(self, job: Callable[[int], Any], batches: int) -> Iterator[Any]:
        found = {number: job(number) for number in reversed(range(batches))}
        for number in range(batches):
            yield [State({k: t.clone() for k, t in s.tensors.items()}, json.loads(json.dumps(s.facts)))
                   for s in found[number]]  # fmt: skip


def test_wherever_batches_run(subject: Subjects, tmp_path: Path) -> None:
    its = subject("unet-sd")
    here = observe(its.program, wishes(its.program), context(its, tmp_path / "a", images=5))
    there = observe(its.program, wishes(its.program), context(its, tmp_path / "b", images=5), Elsewhere())
    assert equal(here, there)


def mib(ctx: Context) -> int:
    return int(ctx.report[-1].split(" MiB")[0].split()[-1])


def test_memory_is_that_of_one_batch(subject: Subjects, tmp_path: Path) -> None:
    """More images in more batches take no more; larger batches do."""
    its = subject("unet-sd")
    value = list(weighted_nodes(its.program))[-1].all_input_nodes[0].name
    found: list[int] = []
    for number, (images, batch_size) in enumerate([(16, 8), (48, 8), (48, 16)]):
        ctx = context(its, tmp_path / str(number), images=images, batch_size=batch_size)
        observe(its.program, {"x": (value, Ranges(4))}, ctx)
        found.append(mib(ctx))
    assert found[0] == found[1] and found[2] == pytest.approx(2 * found[0], abs=1)
    assert found[0] > 0


def test_large_observations_are_not_kept(subject: Subjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    its = subject("unet2d")
    monkeypatch.setattr("tfqc.calibration.kept.MOST", 10_000)
    every = wishes(its.program)
    observe(its.program, every, context(its, tmp_path))
    assert not list(tmp_path.glob("observed-*"))
    small = {k: v for k, v in list(every.items())[:1]}
    ctx = context(its, tmp_path)
    observe(its.program, small, ctx)
    assert len(list(tmp_path.glob("observed-*"))) == 1
    key = next(tmp_path.glob("observed-*")).name.split("-")[1]
    ((value, observer),) = small.values()
    assert len(Kept(tmp_path, key).read({(key, value, observer.key): observer})[0]) == 1
    assert Kept(tmp_path, key).read({(key, value, "other"): observer})[0] == {}


class Overflows(nn.Module):
    """The input of its last layer is infinite at late timesteps, and what it returns is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        huge = torch.exp((500 - timestep.float())[:, None, None] * torch.ones_like(sample))
        return torch.sigmoid(self.last(self.first(sample).abs() + huge + 1)) * 0.1


def test_what_is_infinite_is_named(tmp_path: Path) -> None:
    model = Overflows()
    nn.init.ones_(model.last.weight)
    example = {"sample": torch.zeros(2, 3, 4), "timestep": torch.tensor([10, 10])}
    its = of_example("overflows", lambda: (model, example))
    ctx = context(its, tmp_path)
    with pytest.raises(CalibrationError, match=r"^The input of .*last.* is NaN or infinite at timestep 250: the model"):
        observe(its.program, wishes(its.program), ctx)


def test_ctrl_c_keeps_whole_batches(subject: Subjects, tmp_path: Path, calls: list[int | None]) -> None:
    its = subject("unet2d")
    said: list[tuple[str, int | None]] = []

    class Interrupted:
        def track(self, items: Any, what: str, total: int | None = None) -> Any:
            for number, item in enumerate(items):
                if number == 7:  # in the second batch
                    raise KeyboardInterrupt
                yield item

        def say(self, text: str) -> None: ...

    class Counting(Interrupted):
        def track(self, items: Any, what: str, total: int | None = None) -> Any:
            said.append((what, len(items)))
            yield from items

        def say(self, text: str) -> None:
            said.append((text, None))

    ctx = context(its, tmp_path, images=6)
    with pytest.raises(KeyboardInterrupt):
        observe(its.program, wishes(its.program), replace(ctx, progress=Interrupted()))
    assert len(list(tmp_path.iterdir())) == 1
    calls.clear()
    resumed = observe(its.program, wishes(its.program), replace(ctx, progress=Counting()))
    assert said == [
        ("found 1 of 3 batches of calibration trajectories", None),
        ("sampling calibration images in full precision", 12),
    ]
    assert calls == [0, 1, 2, 3] * 3
    assert equal(resumed, observe(its.program, wishes(its.program), context(its, tmp_path / "fresh", images=6)))
