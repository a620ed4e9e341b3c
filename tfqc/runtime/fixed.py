"""Tensors of a call that have one value for good, since the model's code decided by them: their values as text."""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

from tfqc.runtime.tensors import bytes_of

_TEXT = re.compile(r"(rows of )?\[([\d, ]*)\] (\w+) (sha256:[0-9a-f]{64})")


def fixed_value(value: Tensor) -> str:
    """`[2, 77] int64 sha256:...`; `rows of [77] int64 sha256:...` where rows are all the same, however many."""
    if value.dim() and len(value) and bool((value == value[:1]).all()):
        return f"rows of {_text(value[0])}"
    return _text(value)


def has_fixed_value(text: str, value: Tensor) -> bool:
    """Whether a tensor has the value that `fixed_value` wrote, in its dtype or in another one."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return False
    value = value.to(getattr(torch, found[3]))
    if not found[1]:
        return _text(value) == text
    return value.dim() > 0 and len(value) > 0 and fixed_value(value) == text


def _text(value: Tensor) -> str:
    digest = hashlib.sha256(bytes_of(value).tobytes()).hexdigest()
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} sha256:{digest}"
