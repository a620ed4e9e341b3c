"""Threads that part and meet again, and what the threads of a warp do together."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import PtxError, run
from tests.ptx.compile import compile_ptx
from tests.ptx.snippet import HEADER

SOURCE = r"""
extern "C" __global__ void collatz(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int x = in[i], steps = 0;
    while (x != 1) { x = x & 1 ? 3 * x + 1 : x / 2; steps++; if (steps > 200) { steps = -1; break; } }
    out[i] = steps;
}
extern "C" __global__ void total(const int* in, int* out, int n) {
    __shared__ int of_warp[32];
    int sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += in[i];
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0;
        for (int by = 16; by; by /= 2) sum += __shfl_down_sync(~0u, sum, by);
        if (threadIdx.x == 0) out[blockIdx.x] = sum;
    }
}
extern "C" __global__ void shuffles(int* out, int lane) {
    int x = threadIdx.x * 3;
    int* to = out + threadIdx.x * 8;
    to[0] = __shfl_sync(~0u, x, lane);
    to[1] = __shfl_sync(~0u, x, lane, 8);
    to[2] = __shfl_up_sync(~0u, x, 2);
    to[3] = __shfl_down_sync(~0u, x, 3, 16);
    to[4] = __ballot_sync(~0u, threadIdx.x % 3 == 0);
    to[5] = __any_sync(~0u, threadIdx.x == 5) + 2 * __all_sync(~0u, threadIdx.x < 32);
    to[6] = __reduce_add_sync(~0u, x) + __reduce_max_sync(~0u, x - 50);
    to[7] = threadIdx.x % 2 ? __activemask() : 0;
}
extern "C" __global__ void loops(int* out) {  // the threads of a warp leave the loop one by one, and then all meet
    __shared__ int tile[64];
    int x = 0;
    for (int i = 0; i < threadIdx.x % 7; i++) x += i % 2 ? i : 2 * i;
    tile[threadIdx.x] = x;
    __syncthreads();
    for (int i = 0; i < 3; i++) {
        if (tile[threadIdx.x] > 6) tile[threadIdx.x] -= 5;
        __syncthreads();
    }
    out[threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" __global__ void atomics(int* sums, float* real, unsigned* wrapped, int* old) {
    __shared__ int here;
    if (threadIdx.x == 0) here = 0;
    __syncthreads();
    atomicAdd(&here, 2);
    atomicAdd(sums + threadIdx.x % 4, threadIdx.x);
    atomicMax(sums + 4, threadIdx.x);
    atomicAdd(real, 0.5f);
    atomicInc(wrapped, 6);
    old[threadIdx.x] = atomicCAS(sums + 5, threadIdx.x, threadIdx.x + 1);
    __syncthreads();
    if (threadIdx.x == 0) sums[6] = here;
}
__constant__ int table[4] = {10, 20, 30, 40};
__device__ short weights[3] = {-1, 2, -3};
extern "C" __global__ void anywhere(int* out, int in_shared) {
    __shared__ int tile[64];
    tile[threadIdx.x] = 0;
    int* to = threadIdx.x % 2 == in_shared ? tile : out;
    to[threadIdx.x] = table[threadIdx.x % 4] + weights[threadIdx.x % 3];
    out[threadIdx.x + 64] = tile[threadIdx.x];
}
extern "C" __global__ void any_thread(int* out, int at) {
    int some = __syncthreads_or(threadIdx.x == at), count = __syncthreads_count(threadIdx.x < at);
    out[threadIdx.x] = some + 10 * count + 1000 * __syncthreads_and(threadIdx.x < 50);
}
extern "C" __device__ __noinline__ int called(int x) { return x * x; }
extern "C" __global__ void calls(int* out) { out[threadIdx.x] = called(threadIdx.x); }
extern "C" __global__ void places(int* out) {
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * 24 + thread] = threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * block;
}
"""


def launch(kernel: str, grid: int, threads: int, *args: np.ndarray | np.generic) -> None:
    run(compile_ptx(SOURCE), kernel, (grid, 1, 1), (threads, 1, 1), args)


def test_loops_with_trip_counts_of_their_own() -> None:
    n = 150
    given = np.arange(1, n + 1, dtype=np.int32)
    out = np.zeros(n, np.int32)
    launch("collatz", 3, 64, given, out, np.int32(n))

    def steps(x: int) -> int:
        count = 0
        while x != 1:
            x, count = (3 * x + 1 if x & 1 else x // 2), count + 1
        return count

    assert out.tolist() == [steps(x) for x in given.tolist()]


@pytest.mark.parametrize("threads", [32, 256])
def test_reduction_by_shuffles(threads: int) -> None:
    given, out = np.random.default_rng(0).integers(-99, 99, 1000).astype(np.int32), np.zeros(1, np.int32)
    launch("total", 1, threads, given, out, np.int32(1000))
    assert out[0] == given.sum()


def test_shuffles_and_votes() -> None:
    out = np.zeros((32, 8), np.int32)
    launch("shuffles", 1, 32, out, np.int32(5))
    lane = np.arange(32)
    expected = [
        np.full(32, 15), 3 * (lane // 8 * 8 + 5), 3 * np.where(lane < 2, lane, lane - 2),
        3 * np.where(lane % 16 < 13, lane + 3, lane), np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.full(32, 3), np.full(32, 3 * 496 + 43), np.where(lane % 2, 0xAAAAAAAA - 2**32, 0),
    ]  # fmt: skip
    assert (out == np.stack(expected, 1)).all()


def test_all_meet_behind_loops() -> None:
    out = np.zeros(64, np.int32)
    launch("loops", 1, 64, out)
    sums = [sum(i if i % 2 else 2 * i for i in range(thread % 7)) for thread in range(64)]
    for _ in range(3):
        sums = [x - 5 if x > 6 else x for x in sums]
    assert out.tolist() == sums[::-1]


def test_atomics() -> None:
    sums, real, wrapped, old = (
        np.zeros(n, t) for n, t in ((7, np.int32), (1, np.float32), (1, np.uint32), (64, np.int32))
    )
    launch("atomics", 1, 64, sums, real, wrapped, old)
    assert sums.tolist() == [sum(range(i, 64, 4)) for i in range(4)] + [63, 64, 128]
    assert (real[0], wrapped[0]) == (32, 64 % 7)
    assert (old == np.arange(64)).all()


@pytest.mark.parametrize("in_shared", [0, 1])
def test_generic_addresses_and_constants(in_shared: int) -> None:
    out, thread = np.zeros(128, np.int32), np.arange(64)
    launch("anywhere", 1, 64, out, np.int32(in_shared))
    values = (thread % 4 + 1) * 10 + np.array([-1, 2, -3])[thread % 3]
    assert (out[:64] == np.where(thread % 2 == in_shared, 0, values)).all()
    assert (out[64:] == np.where(thread % 2 == in_shared, values, 0)).all()


@pytest.mark.parametrize("at", [5, 70])
def test_barriers_that_reduce(at: int) -> None:
    out = np.zeros(64, np.int32)
    launch("any_thread", 1, 64, out, np.int32(at))
    assert (out == (at < 64) + 10 * min(at, 64)).all()


def test_calls_are_refused_where_they_are_made() -> None:
    with pytest.raises(PtxError, match=r"calls, line \d+: .*unknown"):
        launch("calls", 1, 32, np.zeros(32, np.int32))


def test_places_of_threads_and_blocks() -> None:
    out = np.zeros(24 * 12, np.int32)
    run(compile_ptx(SOURCE), "places", (2, 3, 2), (4, 3, 2), [out])
    thread = np.arange(24)
    inside = thread % 4 + 10 * (thread // 4 % 3) + 100 * (thread // 12)
    assert (out.reshape(12, 24) == inside + 1000 * np.arange(12)[:, None]).all()


LATE = (
    HEADER
    + """
.visible .entry kernel(.param .u64 p0) {
  .reg .pred %p; .reg .b32 %r<4>; .reg .b64 %rd<2>;
  ld.param.u64 %rd0, [p0];
  mov.u32 %r0, %tid.x;
  setp.lt.u32 %p, %r0, 5;
  @%p bra SOME;
  mov.u32 %r1, 1;
MEET:
  bar.sync 0;
  mad.wide.u32 %rd1, %r0, 4, %rd0;
  st.global.u32 [%rd1], %r1;
  ret;
SOME:
  mov.u32 %r1, 2;
  bra MEET;
}
"""
)


def test_threads_meet_where_the_text_has_them_later() -> None:
    """A branch that the compiler has put behind the rest of the kernel: the others must wait for it."""
    out = np.zeros(32, np.int32)
    run(LATE, "kernel", (1, 1, 1), (32, 1, 1), [out])
    assert out.tolist() == [2] * 5 + [1] * 27


def test_the_end_of_the_text_is_not_the_end_of_a_kernel() -> None:
    with pytest.raises(PtxError, match=r"runs beyond the end"):
        run(LATE.replace("bra MEET;", ""), "kernel", (1, 1, 1), (32, 1, 1), [np.zeros(32, np.int32)])
