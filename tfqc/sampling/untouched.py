"""A model that runs on tensors without values, and is afterwards what it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def untouched(model: torch.nn.Module) -> Generator[None]:
    """What modules keep beside parameters and buffers is put back: caches would hold tensors without values, and hooks
    that a model gives itself at its first call (transformers' do) would be given twice."""
    ours = {"_parameters", "_buffers", "_modules"}
    kept = [(vars(module), {k: v for k, v in vars(module).items() if k not in ours}) for module in model.modules()]
    kept += [(vars(v), dict(vars(v))) for _, own in list(kept) for v in own.values() if _keeps_things(v)]
    lists = [(v, list(v)) for _, own in kept for v in own.values() if type(v) is list]
    kept += [(v, dict(v)) for _, own in list(kept) for v in own.values() if type(v) in (dict, OrderedDict)]
    try:
        yield
    finally:
        for items, before in lists:
            items[:] = before
        for now, before in kept:
            for name in now.keys() - before.keys() - ours:
                del now[name]
            now.update(before)


def _keeps_things(value: Any) -> bool:
    """True for an object of the model's own code that is no module."""
    theirs = type(value).__module__.partition(".")[0] in ("builtins", "torch", "collections", "functools", "types")
    return hasattr(value, "__dict__") and not theirs and not isinstance(value, (torch.nn.Module, Tensor, type, dict))
