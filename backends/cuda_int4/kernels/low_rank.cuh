// The branch of low rank beside a product: y = y + low [M, RANK] . up [N, RANK], f16, by tensor cores that add to the
// f32 of y in place, 16 ranks after the other. Ranks are multiplied in another order than they lie in, so that a thread
// reads neighbours of low; up is packed alike (pack.py).
#pragma once
#include "tile.cuh"

namespace low_rank {

// y lies as the accumulators of a strip at (m0, n0) do. All lanes of a warp take part.
template <class S>
__device__ __forceinline__ void add(gemm::Floats<S>& y, const u16* low, const u16* up, int m0, int n0, int m) {
  constexpr int STEPS = S::RANK / 16, BLOCKS_M = S::WARP_M / 16, BLOCKS_N = gemm::BLOCKS_N;
  if (m0 >= m) return;  // which also keeps what is done here apart from what was before, as registers are few
  const int lane = threadIdx.x % 32, row = m0 + lane / 4;
  const u16* rows = low + (long long)row * S::RANK + lane % 4 * 4;
  const uint4* columns = (const uint4*)up + n0 / gemm::STRIP_N * (STEPS * 64) + lane;
#pragma unroll 1  // the loads of more steps take too many registers
  for (int step = 0; step < STEPS; ++step, rows += 16, columns += 64) {
    const uint4 first = __ldg(columns), second = __ldg(columns + 32);
    const u32 b[BLOCKS_N][2] = {{first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
#pragma unroll
    for (int i = 0; i < BLOCKS_M; ++i) {
      u32 a[4];
      machine::load_global_if(row + i * 16 < m, a[0], a[2], rows + i * 16 * S::RANK);
      machine::load_global_if(row + i * 16 + 8 < m, a[1], a[3], rows + (i * 16 + 8) * S::RANK);
#pragma unroll
      for (int j = 0; j < BLOCKS_N; ++j) machine::multiply_f16(y[i][j], a, b[j][0], b[j][1]);
    }
  }
}

}  // namespace low_rank
