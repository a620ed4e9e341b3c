// y [M, N] = epilogue(sum_k a[m, k] * w[n, k]): unsigned codes a, signed 4-bit codes w, exact s32 sums over all of K.
//
// A block computes TILE_M x TILE_N, a warp 64 x 32 of them, in steps of TILE_K through a ring of STAGES tiles in
// shared memory that cp.async fills. Tiles of a lie row by row, 16-byte chunks swizzled so that the eight rows of a
// matrix that ldmatrix reads together touch all banks once. Weights lie in the order of the instruction's fragments
// (pack.py): the registers of 16 outputs by 64 inputs are 16 bytes for each of 32 lanes, read as they lie.
//
// Body S4 multiplies 4-bit codes (sm_80 to sm_89). Body NIBBLE takes 16 times each code as a byte instead, the low and
// the high codes of a register one after the other, which visits k in the same order in both operands: its sums are
// FACTOR times the real ones, exactly, while K < 2^31 / (FACTOR * most |a w|); specialise.py sees to that. With 8-bit
// a, only w is expanded; pack.py puts two instructions' weights into the two halves of a byte.
#pragma once
#include "epilogue.cuh"
#include "operand.cuh"

namespace gemm {

constexpr int WARP_M = 64, WARP_N = 32;
constexpr int BLOCKS_M = WARP_M / 16, BLOCKS_N = WARP_N / 8;  // instructions that a warp's tile takes along M and N
constexpr int UNIT_K = 64;                                    // inputs in a unit of packed weights, with 16 outputs
constexpr int UNIT_BYTES = 512;

template <class S>
struct Geometry {
  static constexpr int WARPS_N = S::TILE_N / WARP_N, WARPS = S::TILE_M / WARP_M * WARPS_N, THREADS = WARPS * 32;
  static constexpr int CHUNK_CODES = 128 / S::A_BITS;
  static constexpr int CHUNKS = S::TILE_K / CHUNK_CODES;  // of a row of a's tile
  static constexpr int ROW_BYTES = CHUNKS * 16;
  static constexpr int STEPS = S::TILE_K / UNIT_K;
  static constexpr int A_BYTES = S::TILE_M * ROW_BYTES, W_BYTES = S::TILE_N * S::TILE_K / 2;
  static constexpr int STAGE_BYTES = A_BYTES + W_BYTES;
  static constexpr int A_COPIES = A_BYTES / 16 / THREADS, W_COPIES = W_BYTES / 16 / THREADS;  // a thread, a stage
  static constexpr int UNITS = (S::K + UNIT_K - 1) / UNIT_K;
  static constexpr int WHOLE_TILES = S::K / S::TILE_K, TILES = (S::K + S::TILE_K - 1) / S::TILE_K;
  static constexpr bool TAIL = WHOLE_TILES < TILES;

  static_assert(CHUNKS == 4 || CHUNKS == 8, "rows of half or all of the banks");
  static_assert(THREADS % CHUNKS == 0 && THREADS % (STEPS * 32) == 0, "a thread copies one column of chunks");
  static_assert(A_COPIES * THREADS * 16 == A_BYTES && W_COPIES * THREADS * 16 == W_BYTES, "copies fill the stage");

  // Chunk of the tile's row `row` at which its chunk c lies, as c ^ swizzle(row).
  static __device__ __forceinline__ int swizzle(int row) { return row / (8 / CHUNKS) % CHUNKS; }
};

// Copies tiles of both operands; each thread the same chunk column of several rows. Rows beyond M repeat the last.
template <class S>
struct Copier {
  using G = Geometry<S>;
  const u8 *a[G::A_COPIES], *w;
  u32 a_to, w_to;
  int chunk, unit;

  __device__ __forceinline__ Copier(const u8* codes, const u8* weight, int m0, int n0, int m, u32 ring) {
    const int thread = threadIdx.x, row = thread / G::CHUNKS;
    chunk = thread % G::CHUNKS;
#pragma unroll
    for (int i = 0; i < G::A_COPIES; ++i)
      a[i] = codes + S::Operand::row(min(m0 + row + i * (G::THREADS / G::CHUNKS), m - 1));
    a_to = ring + row * G::ROW_BYTES + (chunk ^ G::swizzle(row)) * 16;
    const int piece = thread % (G::STEPS * 32);
    unit = piece / 32;
    w = weight + (long long)(n0 / 16 + thread / (G::STEPS * 32)) * (G::UNITS * UNIT_BYTES) + piece * 16;
    w_to = ring + G::A_BYTES + thread * 16;
  }

  __device__ __forceinline__ void copy(int tile, u32 stage) const {
    const int q = tile * G::CHUNKS + chunk, offset = S::Operand::chunk(q);
#pragma unroll
    for (int i = 0; i < G::A_COPIES; ++i) {
      const u32 to = a_to + stage + i * (G::THREADS * 16);
      if constexpr (G::TAIL)
        machine::copy_async(to, a[i] + offset, q < S::K / G::CHUNK_CODES);
      else
        machine::copy_async(to, a[i] + offset);
    }
    constexpr int ROWS = G::THREADS / (G::STEPS * 32);  // rows of units that all threads copy together
    const u8* from = w + tile * (G::STEPS * UNIT_BYTES);
#pragma unroll
    for (int i = 0; i < G::W_COPIES; ++i) {
      const u32 to = w_to + stage + i * (G::THREADS * 16);
      const u8* row = from + i * (ROWS * G::UNITS * UNIT_BYTES);
      if constexpr (G::TAIL)
        machine::copy_async(to, row, tile * G::STEPS + unit < G::UNITS);
      else
        machine::copy_async(to, row);
    }
  }
};

using Sums = int[BLOCKS_M][BLOCKS_N][4];

// One unit of K: a's chunks at a_at (of the warp's first matrix; others follow at known distances), weights at w_at.
template <class S>
__device__ __forceinline__ void multiply_unit(Sums& acc, u32 a_at, u32 w_at, int step) {
  using G = Geometry<S>;
  u32 w[BLOCKS_N / 2][4];  // registers of blocks 2i and 2i + 1
#pragma unroll
  for (int i = 0; i < BLOCKS_N / 2; ++i)
    machine::load_shared(w[i], w_at + (i * G::STEPS + step) * UNIT_BYTES);
  constexpr int READS = S::A_BITS / 4;  // ldmatrix takes 32 bytes of a row: 64 or 32 codes
#pragma unroll
  for (int read = 0; read < READS; ++read) {
#pragma unroll
    for (int i = 0; i < BLOCKS_M; ++i) {
      u32 a[4];
      machine::load_matrices(a, (a_at ^ ((step * READS + read) * 32)) + i * (16 * G::ROW_BYTES));
      if constexpr (S::BODY == Body::S4) {
#pragma unroll
        for (int j = 0; j < BLOCKS_N; ++j)
          machine::multiply_u4s4(acc[i][j], a, w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
      } else if constexpr (S::A_BITS == 4) {
        const u32 low[4] = {machine::low_codes(a[0]), machine::low_codes(a[1]), machine::low_codes(a[2]),
                            machine::low_codes(a[3])};
        const u32 high[4] = {machine::high_codes(a[0]), machine::high_codes(a[1]), machine::high_codes(a[2]),
                             machine::high_codes(a[3])};
#pragma unroll
        for (int j = 0; j < BLOCKS_N; ++j) {
          const u32 w0 = w[j / 2][j % 2 * 2], w1 = w[j / 2][j % 2 * 2 + 1];
          machine::multiply_u8s8(acc[i][j], low, machine::low_codes(w0), machine::low_codes(w1));
          machine::multiply_u8s8(acc[i][j], high, machine::high_codes(w0), machine::high_codes(w1));
        }
      } else {
#pragma unroll
        for (int j = 0; j < BLOCKS_N; ++j) {
          const u32 w0 = w[j / 2][j % 2 * 2], w1 = w[j / 2][j % 2 * 2 + 1];
          if (read == 0)
            machine::multiply_u8s8(acc[i][j], a, machine::low_codes(w0), machine::low_codes(w1));
          else
            machine::multiply_u8s8(acc[i][j], a, machine::high_codes(w0), machine::high_codes(w1));
        }
      }
    }
  }
}

template <class S, int UNITS>
__device__ __forceinline__ void multiply_tile(Sums& acc, u32 a_at, u32 w_at) {
#pragma unroll
  for (int step = 0; step < UNITS; ++step) multiply_unit<S>(acc, a_at, w_at, step);
}

// A block's part of a product. One barrier a tile is enough: it says both that the tile has come for all threads and
// that all are done with the one before, whose place in the ring is then filled.
template <class S>
__device__ __forceinline__ void run(const u8* a, const u8* weight, const epilogue::Parameters& parameters, int m) {
  using G = Geometry<S>;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = machine::shared_address(shared);
  const int m0 = blockIdx.y * S::TILE_M, n0 = blockIdx.x * S::TILE_N;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / G::WARPS_N * WARP_M, warp_n = warp % G::WARPS_N * WARP_N;

  const Copier<S> copier(a, weight, m0, n0, m, ring);
#pragma unroll
  for (int tile = 0; tile < S::STAGES - 1; ++tile) {
    if (tile < G::TILES) copier.copy(tile, tile * G::STAGE_BYTES);
    machine::copies_end_group();
  }

  // Matrices of ldmatrix: rows 0-7 and 8-15 of the first 16 bytes, then of the second, as the fragment wants them.
  const int row = warp_m + lane % 16;
  const u32 a_at = ring + row * G::ROW_BYTES + (lane / 16 ^ G::swizzle(row)) * 16;
  const u32 w_at = ring + G::A_BYTES + warp_n / 16 * (G::STEPS * UNIT_BYTES) + lane * 16;

  Sums acc = {};
  u32 full = 0, empty = (S::STAGES - 1) * G::STAGE_BYTES;  // offsets in the ring: what to read, what to fill
#pragma unroll 1
  for (int tile = 0; tile < G::WHOLE_TILES; ++tile) {
    machine::copies_wait<S::STAGES - 2>();
    __syncthreads();
    if (tile + S::STAGES - 1 < G::TILES) copier.copy(tile + S::STAGES - 1, empty);
    machine::copies_end_group();
    multiply_tile<S, G::STEPS>(acc, a_at + full, w_at + full);
    empty = full;
    full = full == (S::STAGES - 1) * G::STAGE_BYTES ? 0 : full + G::STAGE_BYTES;
  }
  if constexpr (G::TAIL) {
    machine::copies_wait<0>();
    __syncthreads();
    multiply_tile<S, G::UNITS - G::WHOLE_TILES * G::STEPS>(acc, a_at + full, w_at + full);
  }
  epilogue::finish<S>(acc, parameters, m0 + warp_m, n0 + warp_n, m);
}

}  // namespace gemm
