"""Observing values on the full-precision trajectory of the calibration images: one run for all that ask.

A pass asks `observe` for what it needs. In the rehearsal of a pipeline nothing is measured, but every wish is noted; in
the run behind it, the first pass that asks has all of them observed that are about the functions as they are then, and
the others find theirs. A wish that was not foreseen, or is about functions that a pass has rewritten since, has a run
of its own. Results are found by functions, weights, data and schedule (`Trajectories.key`), so none is stale.

While a batch is sampled for the first time, observers see the calls of the sampler itself; later its trajectory is
replayed from disk. Where the context has a working directory, results are kept there, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch

from tfqc.calibration.executors import Executor
from tfqc.calibration.executors.in_process import InProcess
from tfqc.calibration.kept import Kept, Wish
from tfqc.calibration.observers.base import Observer, State
from tfqc.calibration.replayed import Replayed
from tfqc.calibration.trajectories import Trajectories, nested
from tfqc.calibration.watch import Watch
from tfqc.ir.program import Program
from tfqc.passing.context import Context
from tfqc.sampling.calls import ModelCalls

R = TypeVar("R")
Source = Trajectories | Replayed


def observe(
    program: Program,
    wishes: Mapping[str, tuple[str, Observer[R]]],
    ctx: Context,
    executor: Executor | None = None,
) -> dict[str, R]:
    """Results of observers by the names of `wishes`, which say (name of the value, observer); in a rehearsal unknown
    ones. Adds a line to the report where something was measured.

    Raises:
        CalibrationError: a value or the model's output is NaN or infinite (which, and at which step).
    """
    text = _text(program)
    if ctx.rehearsal:
        for wish, observer in {(text, value, o.key): o for value, o in wishes.values()}.items():
            ctx.foreseen.setdefault(wish, []).append(observer)
        return {name: observer.unknown() for name, (_, observer) in wishes.items()}
    if not wishes:
        return {}
    trajectories = source_of(program, ctx)
    asked: dict[Wish, Observer[Any]] = {
        (trajectories.key, value, observer.key): observer for value, observer in wishes.values()
    }
    if not asked.keys() <= ctx.observed.keys():
        foreseen = {(trajectories.key, v, k): waiting[0] for (t, v, k), waiting in ctx.foreseen.items() if t == text}
        ctx.observed |= _measure(program, ctx, trajectories, foreseen | asked, executor or InProcess())
    found = {n: ctx.observed[trajectories.key, value, o.key].finish() for n, (value, o) in wishes.items()}
    for key, value, observer in asked:
        waiting = ctx.foreseen.get((text, value, observer), [])
        if waiting:
            waiting.pop()
        if not waiting:  # nobody will ask again
            ctx.foreseen.pop((text, value, observer), None)
            ctx.observed.pop((key, value, observer))
    return found


def _measure(
    program: Program,
    ctx: Context,
    trajectories: Source,
    wanted: Mapping[Wish, Observer[Any]],
    executor: Executor,
) -> dict[Wish, Observer[Any]]:
    """Observers that have seen all images: read where they are kept, the others run with the model."""
    kept = None if ctx.workdir is None else Kept(ctx.workdir, trajectories.key)
    found, activations = kept.read(wanted) if kept else ({}, 0)
    missing = {wish: observer for wish, observer in wanted.items() if wish not in found}
    if missing:
        made, activations = _run(program, ctx, trajectories, missing, executor)
        if kept:
            kept.write(made, activations)
        found |= made
    statistics = sum(observer.bytes() for observer in found.values()) * min(len(trajectories), 2)
    values, steps = len({value for _, value, _ in wanted}), len(trajectories.timesteps)
    images, most = len(ctx.need_calibration()), (activations + statistics) / 2**20
    ctx.remark("observed", values=values, steps=steps, images=images, mebibytes=most)
    return found


def _run(
    program: Program,
    ctx: Context,
    trajectories: Source,
    wanted: Mapping[Wish, Observer[Any]],
    executor: Executor,
) -> tuple[dict[Wish, Observer[Any]], int]:
    """One run of the model for all observers; with the bytes of its activations."""
    watch = Watch(program, trajectories.timesteps)
    steps = _steps(wanted.values(), len(trajectories.timesteps))
    there = sum(trajectories.is_there(number) for number in range(len(trajectories)))
    sampled = trajectories.calls + (0 if trajectories.exact else len(steps))
    total = there * len(steps) + (len(trajectories) - there) * sampled
    what = "measuring activations" if there == len(trajectories) else "sampling calibration images in full precision"
    if 0 < there < len(trajectories):
        ctx.progress.say(f"found {there} of {len(trajectories)} batches of calibration trajectories")
    ticks = ctx.progress.track(range(total), what)
    next(ticks, None)

    def before(step: int | None) -> None:
        watch.finished()
        watch.at = step

    def network(**call: Any) -> Any:
        result = watch(**call)
        next(ticks, None)
        return result

    def batch(number: int) -> list[State]:
        own = {wish: observer.fresh(number) for wish, observer in wanted.items()}
        watch.observers = {value: [o for w, o in own.items() if w[1] == value] for _, value, _ in own}
        trajectory = trajectories.read(number)
        watched = trajectory is None and trajectories.exact
        if trajectory is None:
            trajectory = trajectories.sample(number, network, before if watched else None)
        if not watched:
            for step, inputs in trajectory.calls(program):
                if step in steps:
                    before(step)
                    network(**nested({i.path: inputs[i.name] for i in program.inputs}))
        before(None)
        return [observer.state() for observer in own.values()]

    merged: dict[Wish, Observer[Any]] = {}
    with torch.no_grad():
        for states in executor.run(batch, len(trajectories)):
            for (wish, observer), state in zip(wanted.items(), states, strict=True):
                added = type(observer).from_state(state)
                if wish in merged:
                    merged[wish].merge(added)
                else:
                    merged[wish] = added
    for _ in ticks:
        pass
    return merged, watch.activations


def source_of(program: Program, ctx: Context) -> Source:
    """What the model is called with: trajectories that are sampled, or recorded calls."""
    if isinstance(ctx.calibration, ModelCalls):
        return Replayed(program, ctx.calibration, ctx.need_schedule())
    return Trajectories(program, ctx)


def _steps(observers: Iterable[Observer[Any]], count: int) -> set[int]:
    """Positions that any of them looks at."""
    return {step for o in observers for step in (range(count) if o.steps is None else o.steps)}


def _text(program: Program) -> str:
    """Of the functions, apart from weights: a rehearsal has none."""
    digest = hashlib.sha256()
    for name, graph in program.functions.items():
        digest.update(f"@{name}\n{graph.python_code('self').src}".encode())
    return digest.hexdigest()
