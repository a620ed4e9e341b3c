"""Each mistake that a device would not report is an error of the interpreter, and the same without it is none."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from tests.ptx import Counters, PtxError, Struct, run
from tests.ptx.compile import compile_ptx
from tests.ptx.snippet import HEADER

SOURCE = r"""
extern "C" __global__ void stride(const int* in, int* out, int step) {
    out[threadIdx.x] = in[(int)threadIdx.x * step];
}
extern "C" __global__ void wide(const char* in, int4* out, int shift) {
    out[threadIdx.x] = *(const int4*)(in + shift + 16 * threadIdx.x);
}
extern "C" __global__ void exchange(int* out, int width, int sync) {
    __shared__ int tile[256];
    tile[threadIdx.x] = threadIdx.x;
    if (sync) __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x ^ width];
}
extern "C" __global__ void twice(int* out, int sync) {  // the second store may come before the first read
    __shared__ int tile[256];
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x ^ 64];
    if (sync) __syncthreads();
    tile[threadIdx.x] = 1;
}
extern "C" __global__ void collide(int* out, int mask) {
    __shared__ int tile[256];
    tile[threadIdx.x & mask] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[0];
}
extern "C" __global__ void count(int* out, int sync) {
    __shared__ int total;
    if (threadIdx.x == 0) total = 0;
    __syncthreads();
    atomicAdd(&total, 1);
    if (sync) __syncthreads();
    out[threadIdx.x] = total;
}
extern "C" __global__ void partly(int* out, int written) {
    __shared__ int tile[64];
    if (threadIdx.x < written) tile[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void beyond(int* out, int at) {
    __shared__ int first[32];
    __shared__ int second[32];
    first[threadIdx.x] = 1;
    second[threadIdx.x] = 2;
    __syncthreads();
    out[threadIdx.x] = first[threadIdx.x + at] + second[threadIdx.x];
}
extern "C" __global__ void diverge(int* out, int below) {
    if (threadIdx.x < below) { out[threadIdx.x] = 1; __syncthreads(); }
    else out[threadIdx.x] = 2;
    out[threadIdx.x] += 1;
}
extern "C" __global__ void meet(int* out, int other) {
    if (threadIdx.x < 32) asm volatile("bar.sync 1;");
    else if (other) asm volatile("bar.sync 2;");
    else asm volatile("bar.sync 1;");
    out[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle(int* out, int below) {
    if (threadIdx.x < below) out[threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 1);
}
extern "C" __global__ void matrix(int* out, int below) {
    if (threadIdx.x < below) {
        int d0, d1, d2, d3;
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%4}, {%4}, {%4,%4,%4,%4};"
            : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : "r"(threadIdx.x));
        out[threadIdx.x] = d0 + d1 + d2 + d3;
    }
}
extern "C" __global__ void rows(int* out, int shift, int below) {
    __shared__ __align__(16) int tile[64];
    tile[threadIdx.x] = tile[threadIdx.x + 32] = 0;
    __syncthreads();
    unsigned at = (unsigned)__cvta_generic_to_shared(tile) + (threadIdx.x & 7) * 16 + shift, d;
    if (threadIdx.x < below) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d) : "r"(at));
        out[threadIdx.x] = d;
    }
}
extern "C" __global__ void forever(volatile int* out) { while (out[0] == 0); }
extern "C" __global__ void trap(int* out) { if (out[0]) asm volatile("trap;"); }
extern "C" __global__ void local(int* out, int written, int at) {
    int own[8];
#pragma unroll 1
    for (int i = 0; i < written; i++) own[i] = out[i];
    out[threadIdx.x] = own[at];
}
struct Pointers { int n; const int* in; int* out; short last; };
extern "C" __global__ void by_value(const Pointers p) {
    if (threadIdx.x < p.n) p.out[threadIdx.x] = p.in[threadIdx.x] + p.last;
}
"""


def launch(kernel: str, threads: int, *args: np.ndarray | np.generic | Struct) -> Counters:
    return run(compile_ptx(SOURCE), kernel, (1, 1, 1), (threads, 1, 1), args, limit=2000)


def numbers(count: int) -> np.ndarray:
    return np.zeros(count, np.int32)


I = np.int32  # noqa: E741
# kernel, threads, arguments of a sound launch and of a faulty one, and what is said of the latter
FAULTS: dict[str, tuple[str, int, Sequence[object], Sequence[object], str]] = {
    "out of bounds": (
        "stride", 32, [numbers(32), numbers(32), I(1)], [numbers(32), numbers(32), I(2)],
        r"stride, line \d+: `ld\.global.*`: block .* thread \(16, 0, 0\) .*byte 128 of argument 0, .*128 bytes",
    ),
    "before a buffer": (
        "stride", 32, [numbers(32), numbers(32), I(0)], [numbers(32), numbers(32), I(-1)], r"byte -4 of argument 0",
    ),
    "no pointer": (
        "stride", 32, [numbers(32), numbers(32), I(1)], [np.uint64(0), numbers(32), I(1)], r"which is no buffer",
    ),
    "writes beyond": (
        "stride", 33, [numbers(33), numbers(33), I(1)], [numbers(33), numbers(32), I(1)], r"writes 4 bytes",
    ),
    "misaligned vector": (
        "wide", 32, [numbers(160), numbers(128), I(16)], [numbers(160), numbers(128), I(4)], r"16 bytes at misaligned",
    ),
    "read after write": ("exchange", 64, [numbers(64), I(32), I(1)], [numbers(64), I(32), I(0)], r"race: reads"),
    "write after read": ("twice", 128, [numbers(128), I(1)], [numbers(128), I(0)], r"race: writes .* touched by warp"),
    "write after write": ("collide", 64, [numbers(64), I(63)], [numbers(64), I(31)], r"race: writes"),
    "read beside atomics": ("count", 64, [numbers(64), I(1)], [numbers(64), I(0)], r"race: reads .* by an atomic"),
    "uninitialised shared memory": (
        "partly", 64, [numbers(64), I(64)], [numbers(64), I(63)], r"thread \(63, 0, 0\).*tile\+252, .*uninitialised",
    ),
    "another shared variable": ("beyond", 32, [numbers(32), I(0)], [numbers(32), I(1)], r"first\+128, out of bounds"),
    "divergent barrier": ("diverge", 64, [numbers(64), I(64)], [numbers(64), I(48)], r"a barrier in divergent code"),
    "deadlock": ("meet", 64, [numbers(64), I(0)], [numbers(64), I(1)], r"deadlock: .* line \d+ `bar\.sync 2`"),
    "shuffle without all": ("shuffle", 32, [numbers(32), I(32)], [numbers(32), I(31)], r"inactive lanes \[31\]"),
    "mma without all": ("matrix", 32, [numbers(32), I(32)], [numbers(32), I(8)], r"mma is executed without"),
    "ldmatrix without all": ("rows", 32, [numbers(32), I(16), I(32)], [numbers(32), I(16), I(31)], r"ldmatrix is"),
    "misaligned row": ("rows", 32, [numbers(32), I(16), I(32)], [numbers(32), I(8), I(32)], r"16 bytes at misaligned"),
    "no end": ("forever", 1, [numbers(1) + I(1)], [numbers(1)], r"does not end within 2000 steps"),
    "trap": ("trap", 32, [numbers(32)], [numbers(32) + I(1)], r": trap"),
    "uninitialised local memory": ("local", 1, [numbers(8), I(5), I(4)], [numbers(8), I(4), I(4)], r"memory, never"),
    "beyond local memory": ("local", 1, [numbers(8), I(8), I(7)], [numbers(8), I(8), I(8)], r"byte 32 of local"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str) -> None:
    kernel, threads, sound, faulty, message = FAULTS[name]
    launch(kernel, threads, *sound)  # type: ignore[arg-type]
    with pytest.raises(PtxError, match=message):
        launch(kernel, threads, *faulty)  # type: ignore[arg-type]


def test_exchange_within_a_warp_needs_no_barrier() -> None:
    out = numbers(64)
    launch("exchange", 64, out, I(1), I(0))
    assert (out == np.arange(64) ^ 1).all()


def test_whole_warps_may_leave_before_a_barrier() -> None:
    out = numbers(96)
    launch("diverge", 96, out, I(64))
    assert out.tolist() == [2] * 64 + [3] * 32


def test_what_is_read_only_may_not_be_written() -> None:
    out = numbers(32)
    out.flags.writeable = False
    with pytest.raises(PtxError, match=r"argument 1, which is read-only"):
        launch("stride", 32, numbers(32), out, I(1))


def test_nothing_is_written_back_by_a_kernel_that_fails() -> None:
    out = numbers(96)
    with pytest.raises(PtxError):
        launch("diverge", 96, out, I(48))
    assert not out.any()


def test_structs_hold_pointers_where_c_has_them() -> None:
    given, out = np.arange(8, dtype=np.int32), numbers(5)
    launch("by_value", 32, Struct([I(5), given, out, np.int16(-3)]))
    assert (out == given[:5] - 3).all()
    with pytest.raises(PtxError, match=r"argument 0 has 24 bytes, the parameter 32"):
        launch("by_value", 32, Struct([I(5), given, out]))


def test_one_array_is_one_buffer() -> None:
    both = np.arange(32, dtype=np.int32)
    launch("stride", 32, both, both, I(0))
    assert not both.any()
    with pytest.raises(PtxError, match=r"overlaps another argument"):
        launch("stride", 16, both[:20], both[10:], I(0))


@pytest.mark.parametrize(
    ("threads", "args", "message"),
    [(32, [numbers(32)], r"1 arguments for 3"), (2000, [numbers(1)] * 2 + [I(1)], r"2000 threads"),
     (32, [numbers(32), numbers(32), np.int64(1)], r"argument 2 has 8 bytes"),
     (32, [numbers(32), numbers(32), 1], r"argument 2 is a int"),
     (32, [numbers(64)[::2], numbers(32), I(1)], r"not contiguous")],
)  # fmt: skip
def test_launches_that_do_not_fit(threads: int, args: list[np.generic], message: str) -> None:
    with pytest.raises(PtxError, match=message):
        launch("stride", threads, *args)


REGISTERS = (
    HEADER
    + """
.visible .entry kernel(.param .u64 p0) {
  .reg .pred %p; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  ld.param.u64 %rd0, [p0];
  mov.u32 %r0, %tid.x;
  setp.lt.u32 %p, %r0, 31;
  BODY
  mad.wide.u32 %rd1, %r0, 4, %rd0;
  st.global.u32 [%rd1], %r1;
  ret;
}
"""
)


def test_registers_that_nobody_wrote() -> None:
    def launch(body: str) -> None:
        run(REGISTERS.replace("BODY", body), "kernel", (1, 1, 1), (32, 1, 1), [numbers(32)])

    launch("@%p mov.u32 %r1, 1; @!%p mov.u32 %r1, 2;")
    where = re.escape("thread (31, 0, 0) (warp 0 lane 31): reads %r1")
    with pytest.raises(PtxError, match=where):
        launch("@%p mov.u32 %r1, 1;")
    with pytest.raises(PtxError, match=r"line 9: `mov\.u32.*|reads %r2"):
        launch("add.u32 %r1, %r2, 1;")
    launch("mov.u32 %r1, 1; mov.u32 %r3, %r2;")  # a copy of what nobody uses, as compilers emit for undefined values
    with pytest.raises(PtxError, match=r"reads %r3"):
        launch("mov.u32 %r3, %r2; mov.u32 %r1, %r3; add.u32 %r1, %r3, 1;")


def test_kernels_that_are_not_there() -> None:
    with pytest.raises(PtxError, match=r"is not in the text, which has kernel"):
        run(REGISTERS.replace("BODY", ""), "other", (1, 1, 1), (32, 1, 1), [])
