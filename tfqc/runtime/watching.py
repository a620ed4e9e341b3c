"""Which line of a model was the first to compute something that is not finite."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tfqc.runtime.requests import all_finite

_LINES = ("step", "lines")  # functions of model.py that compute a step


class _Found(Exception):
    pass


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.is_meta and not all_finite(leaf):
                raise _Found(_place(sys._getframe(1)))
        return result


def first_not_finite(compute: Callable[[], Any]) -> str:
    """`in down_blocks.0.resnets.0: silu_3 = F.silu(add_2)`, or nothing where every value is finite."""
    try:
        with torch.no_grad(), _Watch():
            compute()
    except _Found as found:
        return str(found)
    return ""


def _place(frame: Any) -> str:
    while frame is not None and not (frame.f_code.co_name in _LINES and frame.f_globals.get("PLAN") is not None):
        frame = frame.f_back
    if frame is None:
        return "in what runs once an image"
    file, number = frame.f_code.co_filename, frame.f_lineno
    line = linecache.getline(file, number, frame.f_globals).strip().partition("; del ")[0]
    before = range(number - 1, frame.f_code.co_firstlineno, -1)
    above = (linecache.getline(file, n, frame.f_globals).strip() for n in before)
    module = next((text.removeprefix("# ") for text in above if text.startswith("# ")), "")
    return f"in {module}: {line}" if module else f"in {line}"
