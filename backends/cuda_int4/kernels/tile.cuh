// Tiles of a product's operands in shared memory, and the copies that fill them.
//
// A stage of the ring has TILE_M rows of a, then TILE_N columns of weights, then the terms of the columns for the
// tile's group of inputs (group.cuh), if there are groups. Rows of a lie one by one, 16-byte chunks swizzled so that
// the eight rows of a matrix that ldmatrix reads together touch all banks once. Weights lie in the order of the
// instruction's fragments (pack.py): the registers of a unit are 16 bytes for each of 32 lanes, read as they lie.
#pragma once
#include "common.cuh"

namespace gemm {

constexpr int STRIP_N = 32, BLOCKS_N = STRIP_N / 8;  // a warp's columns are strips of 32, of 4 instructions each
constexpr int UNIT_BYTES = 512;

// Accumulators of a strip, as instructions have them.
template <class S>
using Sums = int[S::WARP_M / 16][BLOCKS_N][4];
template <class S>
using Floats = float[S::WARP_M / 16][BLOCKS_N][4];

template <class S>
struct Geometry {
  static constexpr int WARPS_N = S::TILE_N / S::WARP_N, WARPS = S::TILE_M / S::WARP_M * WARPS_N, THREADS = WARPS * 32;
  static constexpr int BLOCKS_M = S::WARP_M / 16, STRIPS = S::WARP_N / STRIP_N;  // of a warp
  static constexpr bool HALF = S::BODY == Body::HALF;
  static constexpr int UNIT_N = HALF ? 32 : 16, UNIT_K = HALF ? 32 : 64;  // columns and inputs of packed weights
  static constexpr int READS = UNIT_K * S::A_BITS / 256;  // in a unit, for ldmatrix takes 32 bytes of a row
  static constexpr int CHUNK_CODES = 128 / S::A_BITS;
  static constexpr int CHUNKS = S::TILE_K / CHUNK_CODES;  // of a row of a's tile
  static constexpr int ROW_BYTES = CHUNKS * 16;
  static constexpr int STEPS = S::TILE_K / UNIT_K;
  static constexpr int TERM_BYTES = S::GROUP == 0 ? 0 : HALF ? 2 : 4;  // a scale; 8-bit and 4-bit codes also have sums
  static constexpr int TERMS_BYTES = S::TILE_N * TERM_BYTES * (HALF ? 1 : 2);
  static constexpr int A_BYTES = S::TILE_M * ROW_BYTES, W_BYTES = S::TILE_N * S::TILE_K / 2;
  static constexpr int STAGE_BYTES = A_BYTES + W_BYTES + TERMS_BYTES;
  static constexpr int A_COPIES = A_BYTES / 16 / THREADS;  // of a thread, for a stage
  static constexpr int W_COPIES = (W_BYTES / 16 + THREADS - 1) / THREADS;
  static constexpr bool W_BY_SOME = W_BYTES < THREADS * 16;  // threads beyond them copy no weights
  static constexpr int UNITS = (S::K + UNIT_K - 1) / UNIT_K;
  static constexpr int WHOLE_TILES = S::K / S::TILE_K, TILES = (S::K + S::TILE_K - 1) / S::TILE_K;
  static constexpr bool TAIL = WHOLE_TILES < TILES;

  static_assert(CHUNKS == 4 || CHUNKS == 8, "rows of half or all of the banks");
  static_assert(THREADS % CHUNKS == 0 && THREADS % (STEPS * 32) == 0, "a thread copies one column of chunks");
  static_assert(A_COPIES * THREADS * 16 == A_BYTES, "copies fill the stage");
  static_assert(W_BY_SOME || W_COPIES * THREADS * 16 == W_BYTES, "copies fill the stage");
  static_assert(TERMS_BYTES % 128 == 0 && TERMS_BYTES <= THREADS * 16, "a thread copies one chunk of terms");

  // Chunk of the tile's row `row` at which its chunk c lies, as c ^ swizzle(row).
  static __device__ __forceinline__ int swizzle(int row) { return row / (8 / CHUNKS) % CHUNKS; }
};

// Copies tiles of both operands; each thread the same chunk column of several rows. Rows beyond M repeat the last.
template <class S>
struct Copier {
  using G = Geometry<S>;
  const u8 *a[G::A_COPIES], *w, *terms;
  u32 a_to, to;
  int chunk, unit;

  __device__ __forceinline__ Copier(const u8* rows, const u8* weight, const void* scales, const int* sums, int m0,
                                    int n0, int m, u32 ring) {
    const int thread = threadIdx.x, row = thread / G::CHUNKS;
    chunk = thread % G::CHUNKS;
#pragma unroll
    for (int i = 0; i < G::A_COPIES; ++i)
      a[i] = rows + S::Operand::row(min(m0 + row + i * (G::THREADS / G::CHUNKS), m - 1));
    a_to = ring + row * G::ROW_BYTES + (chunk ^ G::swizzle(row)) * 16;
    const int piece = thread % (G::STEPS * 32);
    unit = piece / 32;
    w = weight + (long long)(n0 / G::UNIT_N + thread / (G::STEPS * 32)) * (G::UNITS * UNIT_BYTES) + piece * 16;
    to = ring + G::A_BYTES + thread * 16;
    if constexpr (S::GROUP > 0) {  // scales, then sums
      constexpr int BYTES = S::TILE_N * G::TERM_BYTES;
      terms = thread * 16 < BYTES ? (const u8*)scales + thread * 16 : (const u8*)sums + (thread * 16 - BYTES);
      terms += n0 * G::TERM_BYTES;
    }
  }

  __device__ __forceinline__ void copy(int tile, u32 stage) const {
    const int q = tile * G::CHUNKS + chunk, offset = S::Operand::chunk(q);
#pragma unroll
    for (int i = 0; i < G::A_COPIES; ++i) {
      const u32 at = a_to + stage + i * (G::THREADS * 16);
      if constexpr (G::TAIL)
        machine::copy_async(at, a[i] + offset, q < S::K / G::CHUNK_CODES);
      else
        machine::copy_async(at, a[i] + offset);
    }
    constexpr int ROWS = G::THREADS / (G::STEPS * 32);  // rows of units that all threads copy together
    const u8* from = w + tile * (G::STEPS * UNIT_BYTES);
    const u32 at = to + stage;
#pragma unroll
    for (int i = 0; i < G::W_COPIES; ++i) {
      const u8* row = from + i * (ROWS * G::UNITS * UNIT_BYTES);
      const bool valid = !G::TAIL || tile * G::STEPS + unit < G::UNITS;
      if constexpr (G::W_BY_SOME)
        machine::copy_async_if(threadIdx.x * 16 < G::W_BYTES, at, row, valid);
      else if constexpr (G::TAIL)
        machine::copy_async(at + i * (G::THREADS * 16), row, valid);
      else
        machine::copy_async(at + i * (G::THREADS * 16), row);
    }
    if constexpr (S::GROUP > 0) {
      constexpr int N_PADDED = (S::N + S::TILE_N - 1) / S::TILE_N * S::TILE_N;
      const int group = tile * S::TILE_K / S::GROUP;
      machine::copy_async_if(threadIdx.x * 16 < G::TERMS_BYTES, at + G::W_BYTES,
                             terms + group * (N_PADDED * G::TERM_BYTES));
    }
  }
};

}  // namespace gemm
