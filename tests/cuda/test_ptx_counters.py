"""Bank conflicts, sectors and instructions of patterns that can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Counters, main_loop, run
from tests.ptx.compile import compile_ptx
from tests.ptx.counters import count_sectors, count_wavefronts

SOURCE = r"""
extern "C" __global__ void banks(int* out, int step) {
    __shared__ int tile[32 * 33];
    for (int i = threadIdx.x; i < 32 * 33; i += 32) tile[i] = i;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x * step];
}
extern "C" __global__ void gather(const int* in, int* out, int step) { out[threadIdx.x] = in[threadIdx.x * step]; }
extern "C" __global__ void vectors(const int4* in, int4* out) { out[threadIdx.x] = in[threadIdx.x]; }
extern "C" __global__ void rows(int* out, int pitch, int swizzle) {
    extern __shared__ __align__(128) char tile[];
    for (int i = threadIdx.x; i < 32 * pitch / 4; i += 32) ((int*)tile)[i] = i;
    __syncthreads();
    unsigned row = threadIdx.x & 7, chunk = swizzle ? row ^ (threadIdx.x >> 3) : threadIdx.x >> 3, d[4];
    unsigned at = (unsigned)__cvta_generic_to_shared(tile) + row * pitch + chunk * 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(at));
    out[threadIdx.x] = d[0] ^ d[1] ^ d[2] ^ d[3];
}
extern "C" __global__ void copies(const char* in, int* out, int pitch, int swizzle) {
    extern __shared__ __align__(128) char tile[];
    int row = threadIdx.x / 2, chunk = threadIdx.x % 2 ^ (swizzle ? row >> 2 & 1 : 0);
    unsigned at = (unsigned)__cvta_generic_to_shared(tile) + row * pitch + chunk * 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(in + 16 * threadIdx.x));
    asm volatile("cp.async.wait_all;");
    out[threadIdx.x] = *(int*)(tile + row * pitch + chunk * 16);
}
extern "C" __global__ void nested(int* out, int n, int m) {
    int d[4] = {0, 0, 0, 0};
#pragma unroll 1
    for (int i = 0; i < n; i++) {
#pragma unroll 1
        for (int j = 0; j < m; j++)
            asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4},"
                "{%0,%1,%2,%3};" : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "r"(threadIdx.x));
        out[threadIdx.x] += d[i & 3];
    }
}
"""


def launch(kernel: str, threads: int, *args: np.ndarray | np.generic, shared: int = 0) -> Counters:
    return run(compile_ptx(SOURCE), kernel, (1, 1, 1), (threads, 1, 1), args, shared)


def of(counters: Counters, opcode: str) -> list[int]:
    """The lines with an instruction."""
    return [line for line, count in counters.lines.items() if count.opcode.startswith(opcode)]


@pytest.mark.parametrize(("step", "conflicts"), [(0, 0), (1, 0), (2, 1), (3, 0), (4, 3), (8, 7), (32, 31), (33, 0)])
def test_bank_conflicts_of_words(step: int, conflicts: int) -> None:
    out = np.zeros(32, np.int32)
    counters = launch("banks", 32, out, np.int32(step))
    assert (out == np.arange(32) * step).all()
    assert counters.conflicts(of(counters, "ld.shared")) == conflicts
    assert counters.conflicts(of(counters, "st.shared")) == 0


@pytest.mark.parametrize(
    ("width", "step", "ideal", "real"),
    [(1, 1, 1, 1), (2, 2, 1, 1), (4, 4, 1, 1), (8, 8, 2, 2), (16, 16, 4, 4), (16, 32, 4, 8), (16, 128, 4, 32),
     (8, 16, 2, 4), (1, 128, 1, 32), (16, 0, 4, 4)],
)  # fmt: skip
def test_wavefronts_of_other_widths(width: int, step: int, ideal: int, real: int) -> None:
    assert count_wavefronts(np.arange(32) * step, width, np.arange(32)) == (ideal, real)


def test_wavefronts_of_few_threads() -> None:
    assert count_wavefronts(np.array([0, 128]), 16, np.array([0, 31])) == (2, 2)
    assert count_wavefronts(np.array([0, 128]), 16, np.array([0, 1])) == (1, 2)


@pytest.mark.parametrize(
    ("pitch", "swizzle", "conflicts"), [(128, 0, 28), (128, 1, 0), (144, 0, 0), (64, 0, 12), (32, 0, 4)]
)
def test_bank_conflicts_of_ldmatrix(pitch: int, swizzle: int, conflicts: int) -> None:
    """Rows of 128 bytes have all chunks of a column in the same banks: 8 wavefronts for each of the 4 matrices."""
    counters = launch("rows", 32, np.zeros(32, np.int32), np.int32(pitch), np.int32(swizzle), shared=32 * pitch)
    assert counters.wavefronts(of(counters, "ldmatrix")) == (4, 4 + conflicts)


@pytest.mark.parametrize(("pitch", "swizzle", "conflicts"), [(32, 0, 0), (32, 1, 0), (128, 0, 12), (128, 1, 12)])
def test_bank_conflicts_of_copies(pitch: int, swizzle: int, conflicts: int) -> None:
    data = np.arange(128, dtype=np.int32)
    counters = launch("copies", 32, data, np.zeros(32, np.int32), np.int32(pitch), np.int32(swizzle), shared=16 * pitch)
    assert counters.wavefronts(of(counters, "cp.async.cg")) == (4, 4 + conflicts)
    assert counters.sectors(of(counters, "cp.async.cg")) == (16, 16)


@pytest.mark.parametrize(("step", "sectors"), [(0, 1), (1, 4), (2, 8), (8, 32), (100, 32)])
def test_sectors(step: int, sectors: int) -> None:
    data = np.zeros(32 * max(step, 1), np.int32)
    counters = launch("gather", 32, data, np.zeros(32, np.int32), np.int32(step))
    assert counters.sectors(of(counters, "ld.global")) == (1 if step == 0 else 4, sectors)
    assert counters.sectors(of(counters, "st.global")) == (4, 4)


def test_sectors_of_vectors_and_warps() -> None:
    counters = launch("vectors", 64, np.zeros((64, 4), np.int32), np.zeros((64, 4), np.int32))
    assert counters.sectors() == (2 * 2 * 16, 2 * 2 * 16)
    assert count_sectors(np.arange(32) * 4 + 16, 4, np.arange(32)) == (4, 5)


def test_instructions_are_counted_by_warp_and_line() -> None:
    counters = launch("nested", 64, np.zeros(64, np.int32), np.int32(3), np.int32(5))
    assert counters.mma == {"m16n8k32.s32.s8.s8.s32": 2 * 3 * 5}
    assert counters.instructions["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"] == 30
    loop = main_loop(compile_ptx(SOURCE), "nested")
    inside = {line: count for line, count in counters.lines.items() if line in loop}
    assert {count.executed for count in inside.values()} == {30}
    assert "mma" in "".join(count.opcode for count in inside.values())
    assert counters.executed <= set(counters.lines)


def test_blocks_add_up_and_may_be_chosen() -> None:
    text, out = compile_ptx(SOURCE), np.zeros(32, np.int32)
    args = [np.arange(32, dtype=np.int32), out, np.int32(1)]
    one = run(text, "gather", (4, 2, 1), (32, 1, 1), args, blocks=[(3, 1, 0)])
    all_ = run(text, "gather", (4, 2, 1), (32, 1, 1), args)
    assert all_.instructions == {name: 8 * count for name, count in one.instructions.items()}
