"""The model inside what torch puts around models."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: Any) -> Any:
    """Without `torch.compile`, DataParallel and DistributedDataParallel; whatever is none of them stays as it is."""
    while isinstance(model, torch.nn.Module):
        compiled_from = getattr(model, "_orig_mod", None)
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(compiled_from, torch.nn.Module):
            model = compiled_from
        else:
            break
    return model
