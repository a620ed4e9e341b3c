// Weights with a scale for each group of GROUP inputs, in the main loop.
//
// With integer codes, the s32 sums of a group become f32 and are added up, in the order of groups, each operation
// rounded once to f32 and never fused:
//
//   y = 0;  for each group g: y = y + float(acc_g - zero * weight_sum[g, n]) * weight_scale[g, n]
//
// With f16 rows there is no zero point; weights are rounded once to f16(code * weight_scale[g, n]).
#pragma once
#include "epilogue.cuh"
#include "tile.cuh"

namespace group {

using gemm::BLOCKS_N;
using epilogue::COLUMNS;

// Sums of a group begin where floats are 1 apart, less the zero point's part: they are then floats as they lie, which
// costs less than converting them. |FACTOR * sum| of 128 codes is less than the 2^22 that have room there.
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
constexpr int MAGIC_BITS = 0x4B400000;

// Zero points of a thread's rows, times -FACTOR.
template <class S>
__device__ __forceinline__ void load_zeros(int (&zeros)[gemm::Geometry<S>::BLOCKS_M * 2], const epilogue::Parameters& p,
                                           int m0, int m) {
  const int step = S::SCALES == Rows::STEP ? __ldg(p.step) : 0;
#pragma unroll
  for (int i = 0; i < gemm::Geometry<S>::BLOCKS_M * 2; ++i) {
    const int row = min(m0 + i * 8 + (int)threadIdx.x % 32 / 4, m - 1);
    zeros[i] = __ldg(p.zero + (S::SCALES == Rows::TOKEN ? row : step)) * -epilogue::Layout<S>::FACTOR;
  }
}

// A thread's columns of the warp's terms, as epilogue::load_columns.
template <class S>
__device__ __forceinline__ void load_columns(u32 (&to)[COLUMNS], u32 terms_at) {
  constexpr bool PAIRED = epilogue::Layout<S>::PAIRED;
  const u32 mine = terms_at + threadIdx.x % 4 * (PAIRED ? 16 : 32);
  u32 first[4], second[4];
  machine::load_shared(first, mine);
  machine::load_shared(second, mine + (PAIRED ? 64 : 16));
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = first[i], to[i + 4] = second[i];
}

template <class S>
__device__ __forceinline__ void begin(gemm::Sums<S>& acc, const int (&zeros)[gemm::Geometry<S>::BLOCKS_M * 2],
                                      u32 terms_at) {
  u32 sums[COLUMNS];
  load_columns<S>(sums, terms_at + S::TILE_N * 4);
#pragma unroll
  for (int i = 0; i < gemm::Geometry<S>::BLOCKS_M * 2; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) acc[i / 2][j / 2][i % 2 * 2 + j % 2] = MAGIC_BITS + zeros[i] * (int)sums[j];
}

template <class S>
__device__ __forceinline__ void end(gemm::Floats<S>& total, const gemm::Sums<S>& acc, u32 terms_at) {
  u32 scales[COLUMNS];
  load_columns<S>(scales, terms_at);
#pragma unroll
  for (int i = 0; i < gemm::Geometry<S>::BLOCKS_M * 2; ++i)
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      float& y = total[i / 2][j / 2][i % 2 * 2 + j % 2];
      const float sum = __fadd_rn(__int_as_float(acc[i / 2][j / 2][i % 2 * 2 + j % 2]), -MAGIC);
      y = __fadd_rn(y, __fmul_rn(sum, __uint_as_float(scales[j])));
    }
}

// The f16 scale of the column of each block that this lane's fragments hold, twice in a register.
template <class S>
__device__ __forceinline__ void load_pairs(u32 (&scales)[BLOCKS_N], u32 terms_at) {
  const u32 g = threadIdx.x % 32 / 4;
  u32 words[4];  // neighbours, of which this lane's block has the first or the second
  if constexpr (epilogue::Layout<S>::PAIRED)
    machine::load_shared(words, terms_at + g / 2 * 8, terms_at + g / 2 * 8 + 32);
  else
    machine::load_shared(words, terms_at + g / 2 * 16);
#pragma unroll
  for (int j = 0; j < BLOCKS_N; ++j) scales[j] = __byte_perm(words[j], 0, g % 2 ? 0x3232 : 0x1010);
}

}  // namespace group
