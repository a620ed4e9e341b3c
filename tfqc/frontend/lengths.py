"""len(x) of a tensor whose first size is a symbol: Python makes a number of it, a capture is to keep the symbol."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def symbolic_lengths(model: torch.nn.Module) -> Generator[None]:
    """Within it `len` in the files of the model's own classes gives symbols for symbolic sizes."""
    own = {type(module).__module__ for module in model.modules()}
    files = [vars(sys.modules[name]) for name in own if name.partition(".")[0] != "torch"]
    files = [names for names in files if "len" not in names]
    for names in files:
        names["len"] = _length
    try:
        yield
    finally:
        for names in files:
            del names["len"]


def _length(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else len(value)
