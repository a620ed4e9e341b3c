"""Running one kernel of the int8 CPU backend by itself, on tensors beyond whose last byte there is no memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
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
GUARD = 64  # bytes


PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


def at_end(values: Tensor) -> Tensor:
    """The same values and strides where memory ends: who reads or writes one byte beyond them is killed."""
    if not values.numel():
        return values
    span = values.as_strided(
        (1 + sum((n - 1) * by for n, by in zip(values.shape, values.stride(), strict=True)),), (1,)
    )
    size = span.numel() * span.element_size()
    pages = -(-size // PAGE) * PAGE
    block = mmap.mmap(-1, pages + PAGE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(block))
    assert _LIBC.mprotect(ctypes.c_void_p(first + pages), ctypes.c_size_t(PAGE), 0) == 0
    made = torch.frombuffer(block, dtype=span.dtype, offset=pages - size, count=span.numel())
    return made.copy_(span).as_strided(values.shape, values.stride())


@functools.cache
def library(isa: str, *names: str) -> ctypes.CDLL:
    """The schedule and kernels, for one instruction set."""
    return build(source_of("schedule.cpp", *(f"{name}.cpp" for name in names)), isa)


_FILES = {"add": "map", "quantize_tokens": "map", "concat": "shape", "upsample": "shape"}  # else the kernel's own name


def run(
    isa: str,
    kernel: str,
    args: ctypes.Structure,
    rows: Sequence[int] = (0,) * 64,
    threads: int = 1,
    scratch: int = 0,
    shared: int = 0,
    filled: int = 0xAA,
) -> None:
    """Runs the kernel `tfqc_{kernel}` once; `rows` has the schedule's row of each batch entry.

    filled: what lies in the memory that kernels may use for themselves.
    """
    of_thread = -(-scratch // 64) * 64  # so that each thread's piece is aligned when the first is
    memory, of_team = (at_end(torch.full((n,), filled, dtype=torch.uint8)) for n in (of_thread * threads, shared))
    places = at_end(torch.tensor(rows, dtype=torch.int64))
    so = library(isa, _FILES.get(kernel, kernel))
    command = abi.Command(ctypes.cast(getattr(so, f"tfqc_{kernel}"), ctypes.c_void_p), ctypes.addressof(args))
    so.tfqc_run(
        ctypes.byref(command), ctypes.c_int64(1), ctypes.c_void_p(places.data_ptr()), ctypes.c_int32(threads),
        ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(of_thread),
        ctypes.c_void_p(of_team.data_ptr()), ctypes.c_int64(shared),
    )  # fmt: skip


class Guarded:
    """An output tensor behind guard bytes and where memory ends; `tensor` fails if they have changed."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel() * dtype.itemsize
        self._bytes = at_end(torch.full((GUARD + size,), 0xA5, dtype=torch.uint8))
        self._tensor = self._bytes[GUARD:].view(dtype).reshape(tuple(shape))

    @property
    def pointer(self) -> int:
        return self._tensor.data_ptr()

    @property
    def tensor(self) -> Tensor:
        assert (self._bytes[:GUARD] == 0xA5).all(), "a kernel writes before its output"
        return self._tensor


def by_row(table: Tensor | None) -> abi.Rows:
    """Parameters [T, ...] of which batch entry b uses rows[b]; none if there is no table."""
    return abi.Rows(table.data_ptr(), table.stride(0), 0, 0) if table is not None else abi.Rows()


def quant(scale: Tensor | None, zero: Tensor | None) -> abi.Quant:
    """Scales f32 [T] and zero points i32 [T], one for each row of the schedule."""
    return abi.Quant(by_row(scale), by_row(zero))
