"""One deterministic sampling loop for every denoiser and every scheduler of diffusers.

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
    steps: int,
    latents: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    guidance: float = 2.0,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoise ``latents`` [N, ...] (unit normal) and return the final ones, same shape and dtype.

    ``cond`` and ``uncond`` hold the denoiser's keyword tensors, one row per image, with the same names. With
    ``uncond`` the denoiser is called once per step on 2B rows, unconditional first, and the outputs u and c
    are combined as u + guidance * (c - u) (Ho and Salimans 2022); without, on B rows, and ``guidance`` is not
    used.

    The timestep is a 0-dim int64 tensor. Only where a sampler visits fractions (Euler set to "linspace") is
    it float32: rounding would change the image without a word.

    ``scheduler`` is any of diffusers with ``set_timesteps``, ``scale_model_input`` and ``step``; it is
    copied, once per batch, so that multistep history neither leaks between batches nor into the caller's
    object. Samplers that draw noise in ``step`` (ancestral ones) run, but are not reproducible here.

    ``progress(done, total)`` counts denoiser calls. ``on_step(index, t, latent, output)`` sees, for each
    batch in turn, the latent that step ``index`` started from (before ``scale_model_input``) and the output
    after guidance.
    """
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    _check_conditions(len(latents), cond, uncond)
    done, results = 0, list[Tensor]()
    for first in range(0, len(latents), batch_size):
        rows = slice(first, first + batch_size)
        c = {name: value[rows] for name, value in cond.items()}
        if uncond is not None:
            c = {name: torch.cat([uncond[name][rows], value]) for name, value in c.items()}
        solver = copy.deepcopy(scheduler)
        solver.set_timesteps(steps)
        x = latents[rows] * solver.init_noise_sigma
        total = len(solver.timesteps) * -(-len(latents) // batch_size)
        for index, t in enumerate(solver.timesteps):
            seen = solver.scale_model_input(x, t)
            with torch.no_grad():
                seen = seen if uncond is None else torch.cat([seen, seen])
                output = _prediction(prediction_of(denoiser(seen, _whole(t), **c), seen), x, solver)
            if uncond is not None:
                u, output = output.chunk(2)
                output = u + guidance * (output - u)
            if on_step is not None:
                on_step(index, int(t), x, output)
            x = solver.step(output, t, x, return_dict=False)[0]
            done += 1
            if progress is not None:
                progress(done, total)
        results.append(x)
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


def _prediction(output: Tensor, x: Tensor, solver: Any) -> Tensor:
    """Without the variance that some models (DiT, PixArt) predict beside, unless the sampler wants it."""
    learned = "learned" in str(getattr(solver.config, "variance_type", ""))
    return output[:, : x.shape[1]] if output.shape[1] == 2 * x.shape[1] and not learned else output
