"""The symptoms of disturbance (tfqc/README.md): how far a feature is from itself, and which timestep it looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Symptoms:
    """Of one feature at each of T steps; see `tfqc.ir.rows.Disturbance`."""

    cosine: tuple[float, ...]
    relative_l2: tuple[float, ...]
    mismatch: tuple[int, ...]


def symptoms(exact: Tensor, disturbed: Tensor) -> Symptoms:
    """Compare a feature [T, requests, ...] with its disturbed self; means over requests.

    mismatch δ_t = argmax_t' cos(e_t', ê_t) − t, in positions of the schedule; a tie with t counts as 0. All in
    float64: at 8 bits 1 − cos is near 1e-6.
    """
    pair = (torch.view_as_real(x) if x.is_complex() else x for x in (exact.detach(), disturbed.detach()))
    e, d = (x.double().flatten(2) for x in pair)
    cosine = _cosine(e, d).mean(1)
    norm = e.norm(dim=2).clamp(min=1e-30)
    relative = ((d - e).norm(dim=2) / norm).mean(1)
    # [T', T] similarity of every true row with every disturbed one, averaged over requests.
    unit = [x / x.norm(dim=2, keepdim=True).clamp(min=1e-30) for x in (e, d)]
    similarity = torch.einsum("arc,brc->ab", unit[0], unit[1])
    best = similarity.max(0).values
    own = similarity.diagonal()
    found = torch.where(own >= best - 1e-12, torch.arange(len(own)), similarity.argmax(0))
    mismatch = found - torch.arange(len(own))
    return Symptoms(tuple(cosine.tolist()), tuple(relative.tolist()), tuple(int(m) for m in mismatch))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    both = (a * b).sum(2)
    return both / (a.norm(dim=2) * b.norm(dim=2)).clamp(min=1e-30)
