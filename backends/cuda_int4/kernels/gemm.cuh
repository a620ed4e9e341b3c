// y [M, N] = epilogue(sum_k a[m, k] * w[n, k]): unsigned codes a, signed 4-bit codes w, exact s32 sums over all of K,
// or over groups of it that are then added in f32 (group.cuh); or f16 a, and f32 sums (multiply.cuh).
//
// A block computes TILE_M x TILE_N, a warp WARP_M x WARP_N of them, in steps of TILE_K through a ring of STAGES tiles
// in shared memory that cp.async fills (tile.cuh).
#pragma once
#include "multiply.cuh"
#include "operand.cuh"

namespace gemm {

template <class S, Body = S::BODY>
struct Total {
  using Type = Sums<S>;
};
template <class S>
struct Total<S, Body::HALF> {
  using Type = Floats<S>;
};

// A warp's sums, a strip of columns after the other: the products of all tiles that were added.
template <class S, bool GROUPED = S::GROUP != 0 && S::BODY != Body::HALF>
struct Accumulator {
  typename Total<S>::Type total[Geometry<S>::STRIPS] = {};

  __device__ __forceinline__ Accumulator(const epilogue::Parameters&, int, int) {}

  template <int UNITS>
  __device__ __forceinline__ void add(int, u32 a_at, u32 w_at, u32 terms_at) {
    multiply_tile<S, UNITS>(total, a_at, w_at, terms_at);
  }
};

template <class S>
struct Accumulator<S, true> {
  static constexpr int TILES = S::GROUP / S::TILE_K;  // of a group
  static_assert(Geometry<S>::STRIPS == 1, "a second set of accumulators");
  Floats<S> total[1] = {};
  Sums<S> sums[1];
  int zeros[Geometry<S>::BLOCKS_M * 2];

  __device__ __forceinline__ Accumulator(const epilogue::Parameters& parameters, int m0, int m) {
    group::load_zeros<S>(zeros, parameters, m0, m);
  }

  template <int UNITS>
  __device__ __forceinline__ void add(int tile, u32 a_at, u32 w_at, u32 terms_at) {
    if (tile % TILES == 0) group::begin<S>(sums[0], zeros, terms_at);
    multiply_tile<S, UNITS>(sums, a_at, w_at, terms_at);
    if (tile % TILES == TILES - 1 || tile == Geometry<S>::TILES - 1) group::end<S>(total[0], sums[0], terms_at);
  }
};

// A block's part of a product. One barrier a tile is enough: it says both that the tile has come for all threads and
// that all are done with the one before, whose place in the ring is then filled.
//
// Tiles of M follow each other first: blocks that run at once share the weights of few columns, which come from DRAM
// once, while the rows, for a layer of a diffusion model a few MB, stay in L2 for the next columns; neighbours of a
// convolution share lines of their image. A grid also has 2^31 - 1 blocks along x, but only 65,535 along y.
template <class S>
__device__ __forceinline__ void run(const u8* a, const u8* weight, const epilogue::Parameters& parameters, int m) {
  using G = Geometry<S>;
  extern __shared__ __align__(1024) u8 shared[];
  const u32 ring = machine::shared_address(shared);
  const int m0 = blockIdx.x * S::TILE_M, n0 = blockIdx.y * S::TILE_N;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / G::WARPS_N * S::WARP_M, warp_n = warp % G::WARPS_N * S::WARP_N;

  const Copier<S> copier(a, weight, parameters.weight_scale, parameters.weight_sum, m0, n0, m, ring);
#pragma unroll
  for (int tile = 0; tile < S::STAGES - 1; ++tile) {
    if (tile < G::TILES) copier.copy(tile, tile * G::STAGE_BYTES);
    machine::copies_end_group();
  }

  // Matrices of ldmatrix: rows 0-7 and 8-15 of the first 16 bytes, then of the second, as the fragment wants them.
  const int row = warp_m + lane % 16;
  const u32 a_at = ring + row * G::ROW_BYTES + (lane / 16 ^ G::swizzle(row)) * 16;
  const u32 w_at = ring + G::A_BYTES + warp_n / G::UNIT_N * (G::STEPS * UNIT_BYTES) + lane * 16;
  const u32 terms_at = ring + G::A_BYTES + G::W_BYTES + warp_n * G::TERM_BYTES;

  Accumulator<S> sums(parameters, m0 + warp_m, m);
  u32 full = 0, empty = (S::STAGES - 1) * G::STAGE_BYTES;  // offsets in the ring: what to read, what to fill
#pragma unroll 1
  for (int tile = 0; tile < G::WHOLE_TILES; ++tile) {
    machine::copies_wait<S::STAGES - 2>();
    __syncthreads();
    if (tile + S::STAGES - 1 < G::TILES) copier.copy(tile + S::STAGES - 1, empty);
    machine::copies_end_group();
    sums.template add<G::STEPS>(tile, a_at + full, w_at + full, terms_at + full);
    empty = full;
    full = full == (S::STAGES - 1) * G::STAGE_BYTES ? 0 : full + G::STAGE_BYTES;
  }
  if constexpr (G::TAIL) {
    machine::copies_wait<0>();
    __syncthreads();
    constexpr int UNITS = G::UNITS - G::WHOLE_TILES * G::STEPS;
    sums.template add<UNITS>(G::WHOLE_TILES, a_at + full, w_at + full, terms_at + full);
  }
#pragma unroll
  for (int strip = 0; strip < G::STRIPS; ++strip)
    epilogue::finish<S>(sums.total[strip], parameters, m0 + warp_m, n0 + warp_n + strip * STRIP_N, m);
}

}  // namespace gemm
