// What a warp multiplies: a unit of K at a time, out of a stage of the ring.
//
// Body S4 multiplies 4-bit codes (sm_80 to sm_89). Body NIBBLE takes 16 times each code as a byte instead, the low and
// the high codes of a register one after the other, which visits k in the same order in both operands: its sums are
// FACTOR times the real ones, exactly, while K < 2^31 / (FACTOR * most |a w|); specialise.py sees to that. With 8-bit
// a, only w is expanded; pack.py puts two instructions' weights into the two halves of a byte. Body HALF multiplies f16
// rows by codes expanded to f16, exactly, and with groups scaled, which rounds each weight once; its sums are f32.
#pragma once
#include "group.cuh"
#include "tile.cuh"

namespace gemm {

template <class S>
using Rows16 = u32[Geometry<S>::READS][Geometry<S>::BLOCKS_M][4];

// One unit of K by a strip of columns: a's chunks at a_at (of the warp's first matrix; others follow at known
// distances), weights at w_at. The first strip reads a, the others use it again.
template <class S>
__device__ __forceinline__ void multiply_unit(Sums<S>& acc, Rows16<S>& rows, u32 a_at, u32 w_at, int step, int strip) {
  using G = Geometry<S>;
  u32 w[BLOCKS_N / 2][4];  // registers of blocks 2i and 2i + 1
#pragma unroll
  for (int i = 0; i < BLOCKS_N / 2; ++i)
    machine::load_shared(w[i], w_at + ((strip * (BLOCKS_N / 2) + i) * G::STEPS + step) * UNIT_BYTES);
#pragma unroll
  for (int read = 0; read < G::READS; ++read) {
#pragma unroll
    for (int i = 0; i < G::BLOCKS_M; ++i) {
      u32(&a)[4] = rows[read][i];
      if (strip == 0) machine::load_matrices(a, (a_at ^ ((step * G::READS + read) * 32)) + i * (16 * G::ROW_BYTES));
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

// The same of f16: a register has the codes of a block's two instructions, one instruction's in each of its bytes.
template <class S>
__device__ __forceinline__ void multiply_unit(Floats<S>& acc, u32 a_at, u32 w_at, const u32 (&scales)[BLOCKS_N],
                                              int step) {
  using G = Geometry<S>;
  u32 w[BLOCKS_N];
  machine::load_shared(w, w_at + step * UNIT_BYTES);
#pragma unroll
  for (int read = 0; read < G::READS; ++read) {
    u32 b[BLOCKS_N][2];
#pragma unroll
    for (int j = 0; j < BLOCKS_N; ++j) {
      machine::expand_codes(b[j], w[j] >> 8 * read);
      if constexpr (S::GROUP > 0)
        b[j][0] = machine::multiply_halves(b[j][0], scales[j]), b[j][1] = machine::multiply_halves(b[j][1], scales[j]);
    }
#pragma unroll
    for (int i = 0; i < G::BLOCKS_M; ++i) {
      u32 a[4];
      machine::load_matrices(a, (a_at ^ ((step * G::READS + read) * 32)) + i * (16 * G::ROW_BYTES));
#pragma unroll
      for (int j = 0; j < BLOCKS_N; ++j) machine::multiply_f16(acc[i][j], a, b[j][0], b[j][1]);
    }
  }
}

template <class S, int UNITS>
__device__ __forceinline__ void multiply_tile(Sums<S> (&acc)[Geometry<S>::STRIPS], u32 a_at, u32 w_at, u32) {
#pragma unroll
  for (int step = 0; step < UNITS; ++step) {
    Rows16<S> rows;
#pragma unroll
    for (int strip = 0; strip < Geometry<S>::STRIPS; ++strip)
      multiply_unit<S>(acc[strip], rows, a_at, w_at, step, strip);
  }
}

template <class S, int UNITS>
__device__ __forceinline__ void multiply_tile(Floats<S> (&acc)[1], u32 a_at, u32 w_at, u32 terms_at) {
  u32 scales[BLOCKS_N];
  if constexpr (S::GROUP > 0) group::load_pairs<S>(scales, terms_at);
#pragma unroll
  for (int step = 0; step < UNITS; ++step) multiply_unit<S>(acc[0], a_at, w_at, scales, step);
}

}  // namespace gemm
