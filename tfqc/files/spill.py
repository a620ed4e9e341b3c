"""Tensors of a program that has no room in memory: in files, of which the kernel holds what it has room for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import psutil
import torch
from torch import Tensor

from tfqc.runtime.cache import private_directory

SMALL = 1 << 20  # bytes of a tensor that is worth no file


def spilled(tensor: Tensor, beside: Iterable[Tensor]) -> Tensor:
    """The values of a tensor, in a file if it and those beside it take more than half of the memory that is free.

    Models that are read from safetensors lie in their files already, so beside a model of any size there is room for
    what passes make of it, one weight at a time. The file has no name, and goes with the tensor. Where it cannot be
    made (no room on disk), the tensor stays in memory.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < SMALL:
        return tensor
    if tensor.nbytes + sum(other.nbytes for other in beside) <= psutil.virtual_memory().available // 2:
        return tensor
    try:
        with tempfile.TemporaryFile(dir=private_directory("spilled")) as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)  # a full disk is an error here, and later a signal
            path = f"/proc/self/fd/{file.fileno()}"
            made = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError:
        return tensor
    return made.view(tensor.shape).copy_(tensor.detach())
