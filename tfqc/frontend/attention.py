"""flex_attention as attention with a mask: the same values, in operations that a program can hold."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from tfqc.errors import CaptureError


@contextmanager
def dense_attention(model: torch.nn.Module) -> Generator[None]:
    """Within it what the model calls as flex_attention computes with a mask that has a truth for each score."""
    own = {sys.modules[type(module).__module__] for module in model.modules()}
    names = [(module, name) for module in own for name, value in vars(module).items() if value is flex.flex_attention]
    ours: list[tuple[Any, str, Any]] = [(place, name, _attention) for place, name in [*names, (flex, "flex_attention")]]
    # The blocks of each column, which nobody asks for here, would be computed by operations of vmap.
    ours.append((flex, "_transpose_ordered", lambda count, indices: (count, indices)))
    ours.append((flex, "create_mask", _every_score))
    theirs = [(place, name, getattr(place, name)) for place, name, _ in ours]
    for place, name, value in ours:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in theirs:
            setattr(place, name, value)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **others: Any,
) -> Any:
    if score_mod is not None or return_lse or others.get("return_aux") is not None:
        raise CaptureError(
            "flex_attention with a function of scores, or with more results than one, has no form with a mask: write "
            "that attention with scaled_dot_product_attention."
        )
    mask = None if block_mask is None else _mask(block_mask, query, key)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=enable_gqa)


def _mask(blocks: Any, query: Tensor, key: Tensor) -> Tensor:
    """[B or 1, H or 1, S, S']: true in blocks that are whole, and in others where their function says so."""
    rows, columns = query.shape[2], key.shape[2]
    mask = _chosen(blocks.kv_num_blocks, blocks.kv_indices, blocks.BLOCK_SIZE, rows, columns)
    if blocks.mask_mod is not None:
        mask = mask & _every_score(blocks.mask_mod, *mask.shape, device=query.device)
    if blocks.full_kv_num_blocks is not None:
        full = _chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices, blocks.BLOCK_SIZE, rows, columns)
        mask = mask | full
    return mask


def _chosen(count: Tensor, indices: Tensor, sizes: tuple[int, int], rows: int, columns: int) -> Tensor:
    """The first `count` [..., Q] of the column blocks `indices` [..., Q, K] of each row block, as a mask of scores."""
    picked = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    blocks = torch.zeros_like(picked).scatter(-1, indices.long(), picked)
    return blocks.repeat_interleave(sizes[0], -2).repeat_interleave(sizes[1], -1)[..., :rows, :columns]


def _every_score(
    function: Any, images: int | None, heads: int | None, rows: int, columns: int, device: Any = None
) -> Tensor:
    """What a function of positions says of every score, in one call of it: what it computes of positions broadcasts."""
    sizes = (images or 1, heads or 1, rows, columns)
    places = [torch.arange(size, device=device).reshape(-1, *[1] * (3 - dim)) for dim, size in enumerate(sizes)]
    return function(*places).expand(sizes)
