"""Tensors of a file where kernels like them: on whole cache lines, in large pages."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

LINE = 64  # bytes
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def load_aligned(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, each at the beginning of a cache line.

    In the file they begin anywhere, and a matrix unit that reads rows of 64 bytes from there takes twice the lines:
    linear layers were 1.25, convolutions 1.4 times slower. For a debug build (see `build`) each has memory of its own,
    so that a read beyond it is seen.
    """
    with path.open("rb") as file:
        begin = 8 + (size := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        sizes = {name: its["data_offsets"][1] - its["data_offsets"][0] for name, its in header.items()}
        block = room(sum(-(-size // LINE) * LINE for size in sizes.values()))
        found: dict[str, Tensor] = {}
        at, apart = 0, bool(os.environ.get("TFQC_DEBUG"))
        for name, its in header.items():
            file.seek(begin + its["data_offsets"][0])
            piece = torch.empty(sizes[name], dtype=torch.uint8) if apart else block[at : at + sizes[name]]
            if file.readinto(piece.numpy()) != sizes[name]:  # type: ignore[attr-defined]
                raise EOFError(f"{path} ends within {name!r}.")
            found[name] = piece.view(_DTYPES[its["dtype"]]).view(its["shape"])
            at += -(-sizes[name] // LINE) * LINE
    return found


def room(size: int) -> Tensor:
    """`size` zero bytes, in pages of 2 MiB where the system gives them: a step of SDXL takes a tenth less."""
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # a system without large pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)[:size]
