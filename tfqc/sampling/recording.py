"""What a pipeline calls its denoiser with: recorded from a run, without running the denoiser.

A pipeline may pass other times than its scheduler's (Flux t/1000, others 1 - t/1000), and sets the scheduler in ways of
its own (shifted by the size of the image). Nothing but a run of it tells.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tfqc.runtime.plan import as_time
from tfqc.sampling.schedule import SamplingSchedule
from tfqc.sampling.scheduler import set_to, steps_of
from tfqc.sampling.untouched import untouched


@dataclass
class Recording:
    """A run of a pipeline.

    calls: arguments of each call of the denoiser by name, as they were. steps: for each step of the scheduler, its
    timestep and how many calls came before it. scheduler: as it was set, before its first step. changed: the pipeline
    had changed the denoiser's attention by the first call.
    """

    calls: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    steps: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    scheduler: Any = None
    changed: bool = False

    def schedule(self, time: str) -> SamplingSchedule:
        """The times that the denoiser was called with, under the name of one of its arguments, and the scheduler.

        Of a denoiser that shares the scheduler's steps with another one, they are its times alone.
        """
        times = [_number(call[time]) for call in self.calls]
        met: dict[float, float] = {}
        before, passed_by = 0, False
        for timestep, count in self.steps:
            if count > before:
                met.setdefault(timestep, times[before])
            passed_by |= count == before
            before = count
        if self.scheduler is None or not met or passed_by:
            return SamplingSchedule(tuple(times))
        if all(a == b for a, b in met.items()):
            return SamplingSchedule.of(self.scheduler, steps_of(self.scheduler))
        known = SamplingSchedule(tuple(met.values()), {"_times": [list(pair) for pair in met.items()]})
        return SamplingSchedule.of(self.scheduler, steps_of(self.scheduler), known.time)


def record(
    pipeline: Any,
    denoiser: torch.nn.Module,
    call: Mapping[str, Any],
    *,
    as_set: bool = False,
    run_denoiser: bool = False,
) -> Recording:
    """Run a pipeline and record the calls of its denoiser; pipeline, scheduler and torch's random state are as before.

    Args:
        call: keyword arguments of the pipeline.
        as_set: its scheduler stays as it has been set, whatever the pipeline would set it to.
        run_denoiser: let it compute what it computes; else it answers with zeros of the right shapes, which it tells on
            the meta device, or by one call where it does not run there.
    """
    return record_each(pipeline, [denoiser], call, as_set=as_set, run_denoisers=run_denoiser)[0]


def record_each(
    pipeline: Any,
    denoisers: Sequence[torch.nn.Module],
    call: Mapping[str, Any],
    *,
    as_set: bool = False,
    run_denoisers: bool = False,
    beside: Sequence[torch.nn.Module] = (),
) -> list[Recording]:
    """As `record`, of one run of a pipeline that has several: a recording for each.

    Args:
        beside: modules beside the denoisers, which compute as they do.
    """
    own = pipeline.scheduler
    models = [*denoisers, *beside]
    found = [Recording() for _ in models]
    forwards = [model.forward for model in models]
    with torch.random.fork_rng(devices=[]):
        try:
            pipeline.scheduler = set_to(own, None) if as_set else copy.deepcopy(own)
            if as_set:
                pipeline.scheduler.set_timesteps = functools.wraps(own.set_timesteps)(lambda *_, **__: None)
            pipeline.scheduler.step = _counted(pipeline.scheduler.step, found)
            for number, (model, recording) in enumerate(zip(models, found, strict=True)):
                runs = run_denoisers or number >= len(denoisers)
                model.forward = _recorded(pipeline, model, recording, runs)
            pipeline(**call)
        finally:
            pipeline.scheduler = own
            for model, forward in zip(models, forwards, strict=True):
                _restore(model, forward)
    return found


def _recorded(pipeline: Any, denoiser: torch.nn.Module, found: Recording, run: bool) -> Callable[..., Any]:
    forward = denoiser.forward
    signature = inspect.signature(forward)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    answers: dict[Any, Any] = {}
    attention = _attention(denoiser)

    @functools.wraps(forward)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if found.scheduler is None:
            found.changed = _attention(denoiser) != attention
            found.scheduler = copy.deepcopy(pipeline.scheduler)
            for patched in ("step", "set_timesteps"):
                vars(found.scheduler).pop(patched, None)
        named = dict(signature.bind(*args, **kwargs).arguments)
        further = named.pop(rest, {})
        given = {**named, **further}
        found.calls.append(pytree.tree_map(lambda v: v, given))  # lists as they are now: models pop what they read
        if run:
            return forward(*args, **kwargs)
        key = str(pytree.tree_map(lambda v: (v.shape, v.dtype) if isinstance(v, Tensor) else v, (args, kwargs)))
        if key not in answers:
            answers[key] = _zeros(denoiser, forward, args, kwargs)
        return answers[key]

    return recorded


def _attention(denoiser: torch.nn.Module) -> list[int]:
    """What computes each attention: pipelines put others in their place (perturbed guidance) and take them away."""
    return [id(module.processor) for module in denoiser.modules() if hasattr(module, "processor")]


def _counted(step: Callable[..., Any], found: Sequence[Recording]) -> Callable[..., Any]:
    signature = inspect.signature(step)

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        timestep = signature.bind(*args, **kwargs).arguments.get("timestep")
        if timestep is not None:
            for recording in found:
                recording.steps.append((_number(timestep), len(recording.calls)))
        return step(*args, **kwargs)

    return counted


def _restore(denoiser: torch.nn.Module, forward: Callable[..., Any]) -> None:
    vars(denoiser).pop("forward", None)
    if denoiser.forward != forward:  # it had one of its own, as offloading hooks have
        denoiser.forward = forward


def _zeros(denoiser: torch.nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What the denoiser returns for these arguments, with zeros for numbers."""
    like = next(v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor))
    patched = vars(denoiser).pop("forward")
    try:
        try:
            made = _on_meta(denoiser, args, kwargs)
        except Exception:  # it does not run there: data decide what it does
            made = forward(*args, **kwargs)
    finally:
        denoiser.forward = patched
    return pytree.tree_map(
        lambda v: torch.zeros(v.shape, dtype=v.dtype, device=like.device) if isinstance(v, Tensor) else v, made
    )


def _on_meta(denoiser: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    tensors = {**dict(denoiser.named_parameters()), **dict(denoiser.named_buffers())}
    on_meta = {name: tensor.to("meta") for name, tensor in tensors.items()}
    args, kwargs = pytree.tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
    with untouched(denoiser):
        return torch.func.functional_call(denoiser, on_meta, args, kwargs)


def _number(time: Any) -> float:
    """The first, where there are several for a batch of images."""
    return as_time(time.flatten()[0] if isinstance(time, Tensor) else time)
