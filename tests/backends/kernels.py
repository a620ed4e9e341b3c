"""Running one kernel of the int8 CPU backend by itself, on tensors, with guard bytes around what it writes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tfqc.backends.cpu_int8.runtime import abi
from tfqc.backends.cpu_int8.runtime.build import ISAS, build, runs_here, source_of

EVERY_ISA = pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=pytest.mark.skipif(not runs_here(isa), reason=f"no {isa} here")) for isa in ISAS]
)
DTYPES = {torch.float32: abi.DType.F32, torch.bfloat16: abi.DType.BF16, torch.uint8: abi.DType.U8}
GUARD = 64  # bytes on either side


@functools.cache
def library(isa: str) -> ctypes.CDLL:
    """The schedule and the kernels that are not integer products, for one instruction set."""
    return build(source_of("schedule.cpp", "norm.cpp", "map.cpp", "shape.cpp"), isa)


def run(
    isa: str,
    kernel: str,
    args: ctypes.Structure,
    rows: Sequence[int] = (0,) * 64,
    threads: int = 1,
    scratch: int = 0,
    shared: int = 0,
) -> None:
    """Runs the kernel `tfqc_{kernel}` once; `rows` has the schedule's row of each batch entry."""
    of_thread = -(-scratch // 64) * 64  # so that each thread's piece is aligned when the first is
    memory = torch.empty(of_thread * threads + 64, dtype=torch.uint8)
    of_team = torch.empty(shared, dtype=torch.uint8)
    so = library(isa)
    command = abi.Command(ctypes.cast(getattr(so, f"tfqc_{kernel}"), ctypes.c_void_p), ctypes.addressof(args))
    so.tfqc_run(
        ctypes.byref(command), ctypes.c_int64(1), (ctypes.c_int64 * len(rows))(*rows), ctypes.c_int32(threads),
        ctypes.c_void_p(memory.data_ptr() + -memory.data_ptr() % 64), ctypes.c_int64(of_thread),
        ctypes.c_void_p(of_team.data_ptr()), ctypes.c_int64(shared),
    )  # fmt: skip


class Guarded:
    """An output tensor between guard bytes; `tensor` fails if they have changed."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = torch.full((GUARD + size + GUARD,), 0xA5, dtype=torch.uint8)
        self._tensor = self._bytes[GUARD : GUARD + size].view(dtype).reshape(tuple(shape))

    @property
    def pointer(self) -> int:
        return self._tensor.data_ptr()

    @property
    def tensor(self) -> Tensor:
        for guard in (self._bytes[:GUARD], self._bytes[-GUARD:]):
            assert (guard == 0xA5).all(), "a kernel writes beyond its output"
        return self._tensor


def by_row(table: Tensor | None) -> abi.Rows:
    """Parameters [T, ...] of which batch entry b uses rows[b]; none if there is no table."""
    return abi.Rows(table.data_ptr(), table.stride(0), 0, 0) if table is not None else abi.Rows()


def quant(scale: Tensor | None, zero: Tensor | None) -> abi.Quant:
    """Scales f32 [T] and zero points i32 [T], one for each row of the schedule."""
    return abi.Quant(by_row(scale), by_row(zero))
