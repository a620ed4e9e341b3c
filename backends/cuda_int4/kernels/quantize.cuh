// f16 values to codes, rows padded to 32 codes with the code of 0. Eight values a thread at a time.
//
// `values` takes the inverse scale and zero point of the whole tensor, as `epilogue` does for codes that it writes.
// `tokens` finds them for each row and writes them, one warp a row: with low = min(x, 0), high = max(x, 0),
//
//   scale = max((high - low) / (2^BITS - 1), eps);  zero = rint(-low / scale);  codes = quantize(x, 1 / scale, zero)
//
// For a convolution of 3 x 3, rows are the pixels of [image, HEIGHT + 2, WIDTH + 2] and its border is the code of 0.
#pragma once
#include "common.cuh"

namespace quantize {

constexpr int GROUP = 8, THREADS = 256;

template <class S>
struct Layout {
  static constexpr int PITCH = (S::K + 31) / 32 * 32, GROUPS = PITCH / GROUP;
  static constexpr bool BORDER = S::HEIGHT > 0;
};

// Values `at` .. at + 7 of a row, 0 beyond K.
template <class S>
__device__ __forceinline__ void load(float (&x)[GROUP], const u16* row, int at) {
#pragma unroll
  for (int i = 0; i < GROUP; ++i) x[i] = 0;
  if constexpr (S::K % GROUP == 0) {
    if (at < S::K) machine::load_halves(x, row + at);
  } else {
#pragma unroll
    for (int i = 0; i < GROUP; ++i)
      if (at + i < S::K) x[i] = machine::to_float(row[at + i]);
  }
}

template <class S>
__device__ __forceinline__ void store(u8* out, long long row, int at, const float (&x)[GROUP], float inverse,
                                      int zero) {
  u32 q[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; ++i) q[i] = codes::quantize<S::BITS>(x[i], inverse, zero);
  codes::store<S::BITS>(out + (row * Layout<S>::PITCH + at) * S::BITS / 8, q);
}

// x f16 [rows, K], or [images, HEIGHT, WIDTH, K] and rows = images * (HEIGHT + 2) * (WIDTH + 2).
template <class S>
__device__ __forceinline__ void values(const u16* x, const float* inverse, const int* zero, const int* step, u8* out,
                                       int rows) {
  using L = Layout<S>;
  const long long index = (long long)blockIdx.x * THREADS + threadIdx.x;
  const int row = (int)(index / L::GROUPS), at = (int)(index % L::GROUPS) * GROUP;
  if (row >= rows) return;
  const int parameter = S::SCALES == Rows::STEP ? *step : 0;
  long long from = row;
  bool inside = true;
  if constexpr (L::BORDER) {
    const int column = row % (S::WIDTH + 2) - 1, line = row / (S::WIDTH + 2) % (S::HEIGHT + 2) - 1;
    const int image = row / ((S::WIDTH + 2) * (S::HEIGHT + 2));
    inside = column >= 0 && column < S::WIDTH && line >= 0 && line < S::HEIGHT;
    from = ((long long)image * S::HEIGHT + line) * S::WIDTH + column;
  }
  float values[GROUP] = {};
  if (inside) load<S>(values, x + from * S::K, at);
  store<S>(out, row, at, values, inverse[parameter], zero[parameter]);
}

// x f16 [rows, K]; scale f32 and zero s32 [rows] are written.
template <class S>
__device__ __forceinline__ void tokens(const u16* x, float* scale, int* zero, u8* out, int rows) {
  using L = Layout<S>;
  const int lane = threadIdx.x % 32, row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const u16* from = x + (long long)row * S::K;
  float low = 0, high = 0, values[GROUP];
  for (int group = lane; group < L::GROUPS; group += 32) {
    load<S>(values, from, group * GROUP);
#pragma unroll
    for (int i = 0; i < GROUP; ++i) low = fminf(low, values[i]), high = fmaxf(high, values[i]);
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
