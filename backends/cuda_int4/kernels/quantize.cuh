// f16 values to codes, rows padded to 32 codes with the code of 0. Eight values a thread at a time. With BITS = 16 the
// values themselves are the codes, for products that take f16.
//
// `values` takes the inverse scale and zero point of the whole tensor, as `epilogue` does for codes that it writes.
// `tokens` finds them for each row and writes them, one warp a row: with low = min(x, 0), high = max(x, 0),
//
//   scale = max((high - low) / (2^BITS - 1), eps);  zero = rint(-low / scale);  codes = quantize(x, 1 / scale, zero)
//
// For a convolution of 3 x 3, rows are the pixels of [image, HEIGHT + 2, WIDTH + 2] and its border is the code of 0.
//
// `values_and_low` also multiplies what it reads, for a branch of low rank (low_rank.cuh): low = x . down [K, RANK].
#pragma once
#include "common.cuh"

namespace quantize {

constexpr int GROUP = 8, THREADS = 256;

template <class S>
struct Layout {
  static constexpr int PITCH = (S::K + 31) / 32 * 32, GROUPS = PITCH / GROUP;
  static constexpr bool BORDER = S::HEIGHT > 0;
};

using Words = u32[GROUP / 2];  // f16, two each

// Values `at` .. at + 7 of a row, 0 beyond K.
template <class S>
__device__ __forceinline__ void load(Words& x, const u16* row, int at) {
#pragma unroll
  for (int i = 0; i < GROUP / 2; ++i) x[i] = 0;
  if constexpr (S::K % GROUP == 0) {
    if (at >= S::K) return;
    const uint4 all = __ldg((const uint4*)(row + at));
    x[0] = all.x, x[1] = all.y, x[2] = all.z, x[3] = all.w;
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      if (at + i < S::K) x[i / 2] |= (u32)row[at + i] << i % 2 * 16;
  }
}

__device__ __forceinline__ float value(const Words& x, int i) {
  return machine::to_float((u16)(x[i / 2] >> i % 2 * 16));
}

template <class S>
__device__ __forceinline__ void store(u8* out, long long row, int at, const Words& x, float inverse, int zero) {
  u8* to = out + (row * Layout<S>::PITCH + at) * S::BITS / 8;
  if constexpr (S::BITS == 16) {
    *(uint4*)to = {x[0], x[1], x[2], x[3]};
  } else {
    u32 q[GROUP];
#pragma unroll
    for (int i = 0; i < GROUP; ++i) q[i] = codes::quantize<S::BITS>(value(x, i), inverse, zero);
    codes::store<S::BITS>(to, q);
  }
}

// x f16 [rows, K], or [images, HEIGHT, WIDTH, K] and rows = images * (HEIGHT + 2) * (WIDTH + 2).
template <class S>
__device__ __forceinline__ void values(const u16* x, const float* inverse, const int* zero, const int* step, u8* out,
                                       int rows) {
  using L = Layout<S>;
  const long long index = (long long)blockIdx.x * THREADS + threadIdx.x;
  const int row = (int)(index / L::GROUPS), at = (int)(index % L::GROUPS) * GROUP;
  if (row >= rows) return;
  long long from = row;
  bool inside = true;
  if constexpr (L::BORDER) {
    const int column = row % (S::WIDTH + 2) - 1, line = row / (S::WIDTH + 2) % (S::HEIGHT + 2) - 1;
    const int image = row / ((S::WIDTH + 2) * (S::HEIGHT + 2));
    inside = column >= 0 && column < S::WIDTH && line >= 0 && line < S::HEIGHT;
    from = ((long long)image * S::HEIGHT + line) * S::WIDTH + column;
  }
  Words values = {};
  if (inside) load<S>(values, x + from * S::K, at);
  if constexpr (S::BITS == 16) {
    store<S>(out, row, at, values, 1, 0);
  } else {
    const int parameter = S::SCALES == Rows::STEP ? *step : 0;
    store<S>(out, row, at, values, inverse[parameter], zero[parameter]);
  }
}

// x f16 [rows, K], down f16 packed (pack.py); codes and low f16 [rows, RANK] are written. A block takes 16 rows, a warp
// of it every WARPS-th 32 inputs. What a thread reads, eight of each of two rows, is quantized, and is also its
// fragment of two instructions, for an order of inputs that down is packed in. Sums of warps w and w + 4, then of w and
// w + 2, and of w and w + 1 are added in f32, and rounded to f16.
template <class S>
__device__ __forceinline__ void values_and_low(const u16* x, const float* inverse, const int* zero, const int* step,
                                               u8* out, const u16* down, u16* low, int rows) {
  constexpr int WARPS = THREADS / 32, BLOCKS = S::RANK / 8, SUMS = BLOCKS * 4;
  __shared__ float shared[WARPS / 2][SUMS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4;
  const int upper = blockIdx.x * 16 + lane / 4, lower = upper + 8;
  const u16* from_upper = x + (long long)min(upper, rows - 1) * S::K;
  const u16* from_lower = x + (long long)min(lower, rows - 1) * S::K;
  const int parameter = S::SCALES == Rows::STEP ? *step : 0;
  const float by = inverse[parameter];
  const int origin = zero[parameter];

  float sums[BLOCKS][4] = {};
  for (int part = warp; part < Layout<S>::PITCH / 32; part += WARPS) {
    const int at = part * 32 + t * GROUP;
    Words first, second;
    load<S>(first, from_upper, at), load<S>(second, from_lower, at);
    if (upper < rows) store<S>(out, upper, at, first, by, origin);
    if (lower < rows) store<S>(out, lower, at, second, by, origin);
    __syncwarp();
    const u32 a[2][4] = {{first[0], second[0], first[1], second[1]}, {first[2], second[2], first[3], second[3]}};
    const uint4* columns = (const uint4*)down + part * (BLOCKS * 32) + lane;
#pragma unroll
    for (int j = 0; j < BLOCKS; ++j) {
      const uint4 b = __ldg(columns + j * 32);
      machine::multiply_f16(sums[j], a[0], b.x, b.y);
      machine::multiply_f16(sums[j], a[1], b.z, b.w);
    }
  }
#pragma unroll
  for (int others = WARPS / 2; others > 0; others /= 2) {
    if (warp >= others && warp < 2 * others)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) shared[warp - others][i][lane] = sums[i / 4][i % 4];
    __syncthreads();
    if (warp < others)
#pragma unroll
      for (int i = 0; i < SUMS; ++i) sums[i / 4][i % 4] = __fadd_rn(sums[i / 4][i % 4], shared[warp][i][lane]);
    __syncthreads();
  }
  if (warp > 0) return;
#pragma unroll
  for (int j = 0; j < BLOCKS; ++j) {
    const int column = j * 8 + t * 2;
    if (upper < rows) *(u32*)(low + (long long)upper * S::RANK + column) = machine::to_halves(sums[j][0], sums[j][1]);
    if (lower < rows) *(u32*)(low + (long long)lower * S::RANK + column) = machine::to_halves(sums[j][2], sums[j][3]);
  }
}

// x f16 [rows, K]; scale f32 and zero s32 [rows] are written.
template <class S>
__device__ __forceinline__ void tokens(const u16* x, float* scale, int* zero, u8* out, int rows) {
  using L = Layout<S>;
  const int lane = threadIdx.x % 32, row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const u16* from = x + (long long)row * S::K;
  float low = 0, high = 0;
  Words values;
  for (int group = lane; group < L::GROUPS; group += 32) {
    load<S>(values, from, group * GROUP);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) low = fminf(low, value(values, i)), high = fmaxf(high, value(values, i));
  }
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    low = fminf(low, __shfl_xor_sync(0xFFFFFFFFu, low, other));
    high = fmaxf(high, __shfl_xor_sync(0xFFFFFFFFu, high, other));
  }
  constexpr float TOP = (float)((1 << S::BITS) - 1), EPSILON = 1.1920929e-07f;
  const float size = fmaxf(__fdiv_rn(__fadd_rn(high, -low), TOP), EPSILON);
  const int origin = __float2int_rn(__fdiv_rn(-low, size));
  const float inverse = __fdiv_rn(1.0f, size);
  for (int group = lane; group < L::GROUPS; group += 32) {
    load<S>(values, from, group * GROUP);
    store<S>(out, row, group * GROUP, values, inverse, origin);
  }
  if (lane == 0) scale[row] = size, zero[row] = origin;
}

}  // namespace quantize
