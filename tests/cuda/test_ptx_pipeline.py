"""A whole product in int4 by cp.async, ldmatrix and mma: each mistake in it is found, and nothing else is."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.ptx import Counters, PtxError, Struct, main_loop, run
from tests.ptx.compile import Compiler, compile_ptx, compiler, nvrtc
from tests.ptx.mutate import MUTATIONS, mutants

M, N, K = 45, 16, 256
TILE, THREADS = 32, 64
SOURCE = r"""
struct Args { const int4* a; const int4* b; int* out; int m, n, k; };  // a [m][k], b [n][k] in 4 bits
__device__ __forceinline__ void copy(unsigned to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void load(unsigned (&r)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from));
}
__device__ __forceinline__ void product(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
extern "C" __global__ void __launch_bounds__(64) gemm(const __grid_constant__ Args p) {
    extern __shared__ __align__(128) unsigned char tiles[];  // stages of 32 rows of a and 16 of b, 32 bytes each
    unsigned base = (unsigned)__cvta_generic_to_shared(tiles);
    int thread = threadIdx.x, lane = thread & 31, row0 = blockIdx.x * 32, steps = p.k / 64;
    auto place = [&](int row, int half) { return row * 32 + ((half ^ (row >> 2 & 1)) * 16); };
    auto stage = [&](int i) {
        int row = thread >> 1, half = thread & 1;
        bool inside = row0 + row < p.m && i < steps;
        unsigned to = base + i % 3 * 1536;
        copy(to + place(row, half), p.a + (inside ? (row0 + row) * (p.k / 32) + i * 2 + half : 0), inside ? 16 : 0);
        if (thread < 32 && i < steps) copy(to + 1024 + place(row, half), p.b + row * (p.k / 32) + i * 2 + half, 16);
        asm volatile("cp.async.commit_group;");
    };
    int c[2][4] = {};
    stage(0);
    stage(1);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();
        stage(i + 2);
        unsigned a[4], b[4], from = base + i % 3 * 1536;
        load(a, from + place((thread >> 5) * 16 + (lane & 15), lane >> 4));
        load(b, from + 1024 + place((lane & 7) | (lane >> 1 & 8), lane >> 3 & 1));
        product(c[0], a, b[0], b[1]);
        product(c[1], a, b[2], b[3]);
    }
    for (int j = 0; j < 2; j++)
        for (int h = 0; h < 4; h++) {
            int row = row0 + (thread >> 5) * 16 + (lane >> 2) + (h >> 1) * 8, col = j * 8 + (lane & 3) * 2 + (h & 1);
            if (row < p.m) p.out[row * p.n + col] = c[j][h];
        }
}
extern "C" __global__ void waits(const int4* in, int* out, int settle, int barrier) {
    __shared__ int4 tile[64];
    unsigned to = (unsigned)__cvta_generic_to_shared(tile + threadIdx.x);
    copy(to, in + threadIdx.x, 16);
    asm volatile("cp.async.commit_group;");
    if (settle) asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (barrier == 1) __syncwarp();
    if (barrier == 2) __syncthreads();
    out[threadIdx.x] = ((volatile int*)tile)[4 * threadIdx.x] + ((volatile int*)tile)[4 * (threadIdx.x ^ 1)];
}
extern "C" __global__ void own(const int4* in, int* out, int bytes) {
    __shared__ int4 tile[64];
    copy((unsigned)__cvta_generic_to_shared(tile + threadIdx.x), in + threadIdx.x, bytes);
    asm volatile("cp.async.wait_all;" ::: "memory");
    for (int i = 0; i < 4; i++) out[4 * threadIdx.x + i] = ((volatile int*)tile)[4 * threadIdx.x + i];
}
extern "C" __global__ void recycle(const int4* in, int* out, int barrier) {  // a copy into what others still read
    __shared__ int4 tile[64];
    tile[threadIdx.x] = make_int4(threadIdx.x, 0, 0, 0);
    __syncthreads();
    int x = ((volatile int*)tile)[4 * (threadIdx.x ^ 32)];
    if (barrier) __syncthreads();
    copy((unsigned)__cvta_generic_to_shared(tile + threadIdx.x), in + threadIdx.x, 16);
    asm volatile("cp.async.wait_all;" ::: "memory");
    out[threadIdx.x] = x + ((volatile int*)tile)[4 * threadIdx.x];
}
extern "C" __global__ void overwrite(const int4* in, int* out) {
    __shared__ int4 tile[64];
    unsigned to = (unsigned)__cvta_generic_to_shared(tile + threadIdx.x);
    copy(to, in + threadIdx.x, 16);
    tile[threadIdx.x] = make_int4(1, 2, 3, 4);
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x].x;
}
"""


def packed(values: np.ndarray) -> np.ndarray:
    return (values[:, 0::2] & 15 | (values[:, 1::2] & 15) << 4).astype(np.uint8)


@functools.cache
def operands() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    return random.integers(-8, 8, (M, K)), random.integers(-8, 8, (N, K))


def gemm(text: str) -> tuple[np.ndarray, Counters]:
    a, b = operands()
    out = np.zeros((M, N), np.int32)
    sizes = [np.int32(size) for size in (M, N, K)]
    grid = (-(-M // TILE), 1, 1)
    args = Struct([packed(a), packed(b), out, *sizes])
    counters = run(text, "gemm", grid, (THREADS, 1, 1), [args], shared_bytes=3 * 1536, limit=100_000)
    return out, counters


def correct() -> np.ndarray:
    a, b = operands()
    return a @ b.T


def test_product_is_exact_and_free_of_conflicts() -> None:
    text = compile_ptx(SOURCE)
    out, counters = gemm(text)
    assert (out == correct()).all()
    loop = main_loop(text, "gemm")
    assert counters.conflicts(loop) == 0
    assert counters.wavefronts(loop)[0] > 0
    assert counters.mma == {"m16n8k64.s32.s4.s4.s32": 2 * 2 * 2 * K // 64}


@functools.cache
def found() -> dict[str, str]:
    """Of each mutant at a place that runs, how it is found out; nothing if it is not."""
    text = compile_ptx(SOURCE)
    lines = gemm(text)[1].executed
    results: dict[str, str] = {}
    for mutant in mutants(text, "gemm", lines):
        try:
            results[mutant.name] = "" if (gemm(mutant.text)[0] == correct()).all() else "numbers"
        except PtxError as error:
            results[mutant.name] = error.message
    return results


def test_every_mutant_is_found() -> None:
    kinds = {name.replace("_", " ") for name in MUTATIONS}
    assert {kind for kind in kinds if any(name.startswith(kind) for name in found())} == kinds
    assert [name for name, how in found().items() if not how] == []


@pytest.mark.parametrize(
    ("mutation", "message"),
    [("late wait", "has not waited for"), ("drop barrier", "no barrier since"), ("drop copy", "uninitialised")],
)
def test_mutants_are_found_for_what_they_are(mutation: str, message: str) -> None:
    assert any(message in how for name, how in found().items() if name.startswith(mutation))


def launch(kernel: str, *args: np.ndarray | np.generic) -> np.ndarray:
    out = np.zeros(256, np.int32)
    data = np.arange(256, dtype=np.int32)
    run(compile_ptx(SOURCE), kernel, (1, 1, 1), (THREADS, 1, 1), [data, out, *args])
    return out


@pytest.mark.parametrize(
    ("settle", "barrier", "message"),
    [(0, 2, "in a group that it has not waited for"), (1, 0, "but there was no barrier since"), (1, 1, ""), (1, 2, "")],
)
def test_copies_are_there_after_wait_and_barrier(settle: int, barrier: int, message: str) -> None:
    if message:
        with pytest.raises(PtxError, match=message):
            launch("waits", np.int32(settle), np.int32(barrier))
    else:
        thread = np.arange(64)
        assert (launch("waits", np.int32(settle), np.int32(barrier))[:64] == 4 * (thread + (thread ^ 1))).all()


@pytest.mark.parametrize("size", [16, 4, 6, 0])
def test_copies_fill_up_with_zeros(size: int) -> None:
    """A thread may read what it has waited for itself, without a barrier."""
    expected = np.arange(256, dtype=np.int32).reshape(64, 4).view(np.uint8)
    expected[:, size:] = 0
    assert (launch("own", np.int32(size)).reshape(64, 4).view(np.uint8) == expected).all()


def test_copies_beyond_a_buffer() -> None:
    text, out = compile_ptx(SOURCE), np.zeros(256, np.int32)
    short = np.arange(4 * 63, dtype=np.int32)
    run(text, "own", (1, 1, 1), (THREADS, 1, 1), [short, out, np.int32(0)])
    with pytest.raises(PtxError, match=r"byte 1008 of argument 0"):
        run(text, "own", (1, 1, 1), (THREADS, 1, 1), [short, out, np.int32(16)])
    with pytest.raises(PtxError, match=r"src-size is more than 16"):
        run(text, "own", (1, 1, 1), (THREADS, 1, 1), [short, out, np.int32(17)])


def test_stores_into_a_copy_that_runs() -> None:
    with pytest.raises(PtxError, match=r"race: writes .* that a cp.async of thread 0 writes"):
        launch("overwrite")


def test_copies_into_what_another_warp_may_still_read() -> None:
    thread = np.arange(64)
    assert (launch("recycle", np.int32(1))[:64] == (thread ^ 32) + 4 * thread).all()
    with pytest.raises(PtxError, match=r"race: writes shared memory at .*, touched by warp 1"):
        launch("recycle", np.int32(0))


def test_mutants_may_be_sampled() -> None:
    text = compile_ptx(SOURCE)
    few = mutants(text, "gemm", at_most=2)
    assert few == mutants(text, "gemm", at_most=2)
    assert len(few) <= 2 * len(MUTATIONS)
    assert all(each.text != text and each.text.count("\n") == text.count("\n") for each in few)
    assert {each.name for each in few} < {each.name for each in mutants(text, "gemm")}
    assert mutants(text, "gemm", lines=[]) == []


def both() -> list[Compiler]:
    return [each for each in (compiler(), nvrtc()) if each is not None]


@pytest.mark.parametrize("which", [0, 1])
def test_either_compiler(which: int) -> None:
    if which >= len(both()):
        pytest.skip("there is not a second compiler (nvcc and the package nvidia-cuda-nvrtc) here")
    assert (gemm(compile_ptx(SOURCE, using=both()[which]))[0] == correct()).all()
