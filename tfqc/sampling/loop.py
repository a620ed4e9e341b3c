"""One deterministic sampling loop for every denoiser and every scheduler.

The reference model and a compiled one go through the same code, so two results differ by the denoiser alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfqc.runtime.outputs import prediction_of
from tfqc.runtime.plan import as_time
from tfqc.sampling.scheduler import set_to
from tfqc.sampling.solver import Rest, Solver

Denoiser = Callable[..., Any]
"""``denoiser(sample, t, **conditions)``: returns a tensor, or a tuple, a dictionary or a dataclass that holds it."""


def initial_noise(n: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal noise, float32 [n, *shape]; row i depends on (seed, i) alone.

    So the first 20 of 1000 images are the images of a run of 20. Philox is counter-based: image i owns the
    counters whose top word is i, and no two rows can share numbers.
    """

    def row(i: int) -> Tensor:
        rng = np.random.Generator(np.random.Philox(key=seed, counter=np.array([0, 0, 0, i], np.uint64)))
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    return torch.stack([row(i) for i in range(n)]) if n else torch.empty(0, *shape)


def sample(
    denoiser: Denoiser,
    scheduler: Any,
    *,
    steps: int | None = None,
    latents: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    guidance: float = 2.0,
    batch_size: int = 64,
    seed: int = 0,
    time_of: Callable[[Any], float] = as_time,
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoise ``latents`` [N, ...] (unit normal) and return the final ones, same shape and dtype.

    ``cond`` and ``uncond`` hold the denoiser's keyword tensors, one row per image, with the same names. With
    ``uncond`` the denoiser is called once per step on 2B rows, unconditional first, and the outputs u and c
    are combined as u + guidance * (c - u) (Ho and Salimans 2022); without, on B rows, and ``guidance`` is not
    used.

    The time is a 0-dim int64 tensor. Only where it is a fraction (Euler set to "linspace", flow times) is it
    float32: rounding would change the image without a word. ``time_of`` says it for a timestep of the scheduler.

    ``scheduler`` is any of diffusers, or one with ``set_timesteps``, ``timesteps`` and ``step`` as they have them
    (``scale_model_input``, ``init_noise_sigma`` where there are any). It is copied, once per batch, so that multistep
    history neither leaks between batches nor into the caller's object, and set to ``steps`` if these are given and it
    is not set to as many. The noise that samplers draw in ``step`` (ancestral ones) depends on (seed, image) where they
    take a generator for each image, and else on (seed, batch).

    Where the model's output is smaller than its input along one dimension (inpainting, video from an image), the first
    part of the input is what is denoised; the rest of ``latents`` goes in as it is.

    ``progress(done, total)`` counts denoiser calls. ``on_step(index, t, latent, output)`` sees, for each
    batch in turn, the latent that step ``index`` started from (before ``scale_model_input``) and the output
    after guidance.
    """
    if (steps is not None and steps < 1) or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    _check_conditions(len(latents), cond, uncond)
    done, results = 0, list[Tensor]()
    for first in range(0, len(latents), batch_size):
        rows = slice(first, first + batch_size)
        c = {name: value[rows] for name, value in cond.items()}
        if uncond is not None:
            c = {name: torch.cat([uncond[name][rows], value]) for name, value in c.items()}
        own = copy.deepcopy(scheduler) if steps is None else set_to(scheduler, steps)
        solver = Solver(own, seed, range(first, first + len(latents[rows])))
        given = latents[rows]
        x, rest = (given * solver.scale).to(given.dtype), Rest()
        total = len(solver.timesteps) * -(-len(latents) // batch_size)
        for index, t in enumerate(solver.timesteps):
            seen = rest.joined(solver.seen(x, t))
            with torch.no_grad():
                seen = seen if uncond is None else torch.cat([seen, seen])
                output = prediction_of(denoiser(seen, _whole(torch.tensor(time_of(t))), **c), seen)
                if index == 0:
                    rest = Rest.of(given, output)
                    x = rest.without(x)
                output = _prediction(output, x, solver)
            if uncond is not None:
                u, output = output.chunk(2)
                output = u + guidance * (output - u)
            if on_step is not None:
                on_step(index, int(t), x, output)
            x = solver.step(output, t, x)
            done += 1
            if progress is not None:
                progress(done, total)
        results.append(rest.joined(x))
    return torch.cat(results) if results else latents.clone()


def _check_conditions(n: int, cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor] | None) -> None:
    if uncond is not None and uncond.keys() != cond.keys():
        raise ValueError(f"cond has {sorted(cond)} but uncond has {sorted(uncond)}")
    for name, value in [*cond.items(), *(uncond or {}).items()]:
        if len(value) != n:
            raise ValueError(f"condition {name!r} has {len(value)} rows for {n} latents")


def _whole(t: Tensor) -> Tensor:
    """int64 if nothing is lost by it: some schedulers keep whole timesteps as floats."""
    return t.long() if bool(t == t.long()) else t.float()


def _prediction(output: Tensor, x: Tensor, solver: Solver) -> Tensor:
    """Without the variance that some models (DiT, PixArt) predict beside, unless the sampler wants it."""
    beside = output.shape[1] == 2 * x.shape[1] and not solver.learns_variance
    return output[:, : x.shape[1]] if beside else output
