"""Tensors of a file where kernels like them: on whole cache lines, in large pages."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from tfqc.runtime.tensors import read_header

LINE = 64  # bytes


def load_aligned(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each at the beginning of a cache line.

    In the file they begin anywhere, and a matrix unit that reads rows of 64 bytes from there takes twice the lines:
    linear layers were 1.25, convolutions 1.4 times slower. For a debug build (see `build`) each has memory of its own,
    so that a read beyond it is seen.

    Raises:
        ValueError: the file is damaged (how).
    """
    entries = read_header(path).entries
    sizes = {name: entry.end - entry.begin for name, entry in entries.items()}
    block = room(sum(-(-size // LINE) * LINE for size in sizes.values()))
    found: dict[str, Tensor] = {}
    at, apart = 0, bool(os.environ.get("TFQC_KERNEL_CHECKS"))
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.begin)
            piece = torch.empty(sizes[name], dtype=torch.uint8) if apart else block[at : at + sizes[name]]
            if file.readinto(piece.numpy()) != sizes[name]:  # type: ignore[attr-defined]
                raise EOFError(f"{path} ends within {name!r}.")
            found[name] = piece.view(entry.dtype).view(entry.shape)
            at += -(-sizes[name] // LINE) * LINE
    return found


def room(size: int) -> Tensor:
    """`size` zero bytes, in pages of 2 MiB where the system gives them: a step of SDXL takes a tenth less."""
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without large pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)[:size]
