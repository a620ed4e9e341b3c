// What becomes of a product's sums. In this order, every operation rounded once to f32 and never fused:
//
//   t = float(acc - zero * weight_sum[n])        exact in s32, then rounded to the nearest even
//   y = t * (scale * weight_scale[n])            groups have added up t * weight_scale (group.cuh): y = t * scale
//   y = y + sum_r low[m, r] * up[n, r]           f16, added in f32 for each 16 ranks (low_rank.cuh)
//   y = y + bias[n]
//   y = activation(y)                            GEGLU: value * gelu(gate) of two columns of the same thread
//   y = y + float(residual[m, n])                f16
//   out: f16 to the nearest even, or codes::quantize(y, out_inverse, out_zero)
//
// Of f16 rows, t are the f32 sums, and there is no scale or zero point of the input. Body NIBBLE has FACTOR * acc:
// FACTOR goes into the zero point, and 1 / FACTOR, a power of two, into the scale, which gives the same y while scales
// are normal numbers. Activations are those of CUDA's fast math, a few units in the last place of f32 away from the
// exact ones. How tensor cores round within an instruction (low ranks, and sums of f16 rows) is the chip's.
//
// Columns of weights lie so that a thread's eight sums of a row are neighbours: columns 8 t .. 8 t + 7 of a strip of 32
// for t = lane % 4, and with GEGLU, whose 32 are 16 values and their 16 gates, 4 t .. 4 t + 3 of each (pack.py).
#pragma once
#include "low_rank.cuh"

namespace epilogue {

constexpr int COLUMNS = 8;  // of a thread, in each of its rows

// Arrays of columns are padded to whole tiles; `step` is the index of the schedule's row, in device memory. What is
// read does not overlap `out`.
struct Parameters {
  const int* weight_sum;      // [groups, N]
  const float* weight_scale;  // [groups, N]; with f16 rows and groups, f16
  const float* bias;          // [1 or T, N]
  const float* scale;         // [1], [T] or [M], as S::SCALES says
  const int* zero;            // as scale
  const int* step;            // [1]
  const u16* residual;        // f16 [M, OUT_N]
  const u16* low;             // f16 [M, RANK]
  const u16* up;              // f16 [N, RANK], packed
  const float* out_inverse;   // [1] or [T], as S::OUT_SCALES says: 1 / scale of the codes that are written
  const int* out_zero;        // as out_inverse
  void* out;                  // f16 or s32 [M, OUT_N], or codes [M, OUT_N padded to 32]
};

__device__ __forceinline__ float silu(float y) { return __fdividef(y, 1.0f + __expf(-y)); }

// y Phi(y) = max(y, 0) - |y| Phi(-|y|), the latter by formula 7.1.26 of Abramowitz and Stegun: within 4e-7 |y| of the
// exact value, for half of the instructions of erff, which held products of few K.
__device__ __forceinline__ float gelu(float y) {
  const float size = fabsf(y), t = machine::reciprocal(fmaf(size, 0.3275911f * 0.70710678f, 1.0f));
  float tail = fmaf(t, 0.5f * 1.061405429f, 0.5f * -1.453152027f);
  tail = fmaf(tail, t, 0.5f * 1.421413741f);
  tail = fmaf(tail, t, 0.5f * -0.284496736f);
  tail = fmaf(tail, t, 0.5f * 0.254829592f) * t;
  return fmaf(-size * tail, machine::power_of_two(y * y * (-0.5f * 1.44269504f)), fmaxf(y, 0.0f));
}

// 0.5 y (1 + tanh u) = y / (1 + exp(-2 u)) for u = sqrt(2 / pi) (y + 0.044715 y^3).
__device__ __forceinline__ float gelu_tanh(float y) {
  return __fdividef(y, 1.0f + __expf(y * (-1.5957691f - 0.071354816f * y * y)));
}

// Of what is written: f32 until it is rounded.
template <Out>
struct Value {
  using Type = float;
};
template <>
struct Value<Out::S32> {
  using Type = int;
};

template <class S>
struct Layout {
  static constexpr bool PAIRED = S::ACTIVATION == Activation::GEGLU;
  static constexpr int N_PADDED = (S::N + S::TILE_N - 1) / S::TILE_N * S::TILE_N;
  static constexpr int OUT_N = PAIRED ? S::N / 2 : S::N, OUT_COLUMNS = PAIRED ? COLUMNS / 2 : COLUMNS;
  static constexpr bool CODES = S::OUT == Out::U4 || S::OUT == Out::U8;
  static constexpr int PITCH = CODES ? (OUT_N + 31) / 32 * 32 : OUT_N;  // values in a row that is written
  static constexpr bool CODED = S::BODY != Body::HALF;  // the input has a scale and a zero point
  static constexpr bool SUMS = CODED && S::GROUP == 0;  // accumulators are s32, and have the zero point's part
  static constexpr int SHIFT = S::BODY != Body::NIBBLE ? 0 : S::A_BITS == 4 ? 8 : 4;
  static constexpr int FACTOR = 1 << SHIFT;
};

// A thread's columns of an array that begins at the warp's: two loads of 16 bytes.
template <class S, class T4, class T>
__device__ __forceinline__ void load_columns(T (&to)[COLUMNS], const T* from, int t) {
  constexpr bool PAIRED = Layout<S>::PAIRED;
  const T* mine = from + t * (PAIRED ? 4 : 8);
  const T4 first = __ldg((const T4*)mine), second = __ldg((const T4*)(mine + (PAIRED ? 16 : 4)));
  to[0] = first.x, to[1] = first.y, to[2] = first.z, to[3] = first.w;
  to[4] = second.x, to[5] = second.y, to[6] = second.z, to[7] = second.w;
}

// Pairs of f16 of a row of the residual from `column` on, 0 beyond OUT_N. Loads in assembly are not moved to where
// their values are needed.
template <class S, int PAIRS>
__device__ __forceinline__ void load_residual(u32 (&to)[PAIRS], const u16* row, int column) {
  using L = Layout<S>;
  const u16* from = row + column;
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) to[i] = 0;
  if constexpr (L::OUT_N % (2 * PAIRS) == 0) {
    if (column >= L::OUT_N) return;
    if constexpr (PAIRS == 4)
      machine::load_global(to, from);
    else
      machine::load_global(to[0], to[1], from);
  } else {
#pragma unroll
    for (int i = 0; i < 2 * PAIRS; ++i)
      if (column + i < L::OUT_N) to[i / 2] |= (u32)__ldg(from + i) << i % 2 * 16;
  }
}

template <class S, int COUNT>
__device__ __forceinline__ void activate(float (&out)[COUNT], const float (&y)[COLUMNS]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if constexpr (S::ACTIVATION == Activation::SILU)
      out[i] = silu(y[i]);
    else if constexpr (S::ACTIVATION == Activation::GELU)
      out[i] = gelu(y[i]);
    else if constexpr (S::ACTIVATION == Activation::GELU_TANH)
      out[i] = gelu_tanh(y[i]);
    else if constexpr (S::ACTIVATION == Activation::GEGLU)
      out[i] = __fmul_rn(y[i], gelu(y[i + COUNT]));
    else
      out[i] = y[i];
  }
}

template <class S, int COUNT>
__device__ __forceinline__ void store(void* to, long long row, int column, const float (&y)[COUNT], float inverse,
                                      int zero) {
  using L = Layout<S>;
  const long long at = row * L::PITCH + column;
  if constexpr (L::CODES) {
    constexpr int BITS = S::OUT == Out::U4 ? 4 : 8;
    u32 q[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) q[i] = codes::quantize<BITS>(y[i], inverse, zero);
    codes::store<BITS>((u8*)to + at * BITS / 8, q);
  } else if constexpr (L::PITCH % COUNT == 0) {
    machine::store_halves((u16*)to + at, y);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (column + i < L::OUT_N) ((u16*)to)[at + i] = (u16)machine::to_halves(y[i], 0.0f);
  }
}

// Parameters of the input for a thread's rows. Tokens have their own: the four lanes of a row take COUNT rows each,
// and give them to the others.
template <class S, class T, int COUNT>
__device__ __forceinline__ void load_of_rows(T (&to)[COUNT], const T* from, const Parameters& p, int m0, int m) {
  const int lane = threadIdx.x % 32, step = S::SCALES == Rows::STEP ? __ldg(p.step) : 0;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const int row = min(m0 + (lane % 4 * COUNT + i) * 8 + lane / 4, m - 1);
    to[i] = __ldg(from + (S::SCALES == Rows::TOKEN ? row : step));
  }
}

template <class S, class T, int COUNT>
__device__ __forceinline__ T of_row(const T (&loaded)[COUNT], int i) {
  return S::SCALES == Rows::TOKEN ? __shfl_sync(0xFFFFFFFFu, loaded[i % COUNT], i / COUNT, 4) : loaded[0];
}

// From sums acc of a warp's product, y of its rows by a strip of columns at (m0, n0) before the bias; with Out::S32,
// the sums less the zero point's part. All lanes take part, also those whose rows or columns are beyond the output.
template <class S, class Y, class T, int BLOCKS_M, int BLOCKS_N>
__device__ __forceinline__ void scale(Y (&y)[BLOCKS_M][BLOCKS_N][4], T (&acc)[BLOCKS_M][BLOCKS_N][4],
                                      const Parameters& p, int m0, int n0, int m) {
  using L = Layout<S>;
  constexpr int COUNT = (BLOCKS_M * 2 + 3) / 4;
  const int t = threadIdx.x % 4;
  if constexpr (L::SUMS) {
    int zeros[COUNT], sums[COLUMNS];
    load_of_rows<S>(zeros, p.zero, p, m0, m);
    load_columns<S, int4>(sums, p.weight_sum + n0, t);
#pragma unroll
    for (int i = 0; i < BLOCKS_M * 2; ++i) {
      const int zero = of_row<S>(zeros, i) * L::FACTOR;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) acc[i / 2][j / 2][i % 2 * 2 + j % 2] -= zero * sums[j];
    }
  }
  float inputs[COUNT], scales[COLUMNS];
  if constexpr (L::CODED && S::OUT != Out::S32) load_of_rows<S>(inputs, p.scale, p, m0, m);
  if constexpr (S::GROUP == 0 && S::OUT != Out::S32) load_columns<S, float4>(scales, p.weight_scale + n0, t);
#pragma unroll
  for (int i = 0; i < BLOCKS_M * 2; ++i) {
    const float by = L::CODED ? of_row<S>(inputs, i) * (1.0f / L::FACTOR) : 1;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      const T sum = acc[i / 2][j / 2][i % 2 * 2 + j % 2];
      Y& to = y[i / 2][j / 2][i % 2 * 2 + j % 2];
      if constexpr (S::OUT == Out::S32)
        to = sum >> L::SHIFT;
      else if constexpr (S::GROUP > 0)
        to = __fmul_rn(sum, by);
      else
        to = __fmul_rn((float)sum, __fmul_rn(by, scales[j]));
    }
  }
}

// All that a warp does after its product: sums acc of its rows by a strip of columns at (m0, n0).
template <class S, class T, int BLOCKS_M, int BLOCKS_N>
__device__ __forceinline__ void finish(T (&acc)[BLOCKS_M][BLOCKS_N][4], const Parameters& p, int m0, int n0, int m) {
  using L = Layout<S>;
  static_assert(BLOCKS_N * 2 == COLUMNS, "a thread has two columns of each instruction");
  typename Value<S::OUT>::Type values[BLOCKS_M][BLOCKS_N][4];
  scale<S>(values, acc, p, m0, n0, m);
  if constexpr (S::RANK > 0) low_rank::add<S>(values, p.low, p.up, m0, n0, m);

  const int lane = machine::thread() % 32, t = lane % 4;
  constexpr bool STEPPED = S::BIAS == Bias::STEP || L::CODES && S::OUT_SCALES == Rows::STEP;
  const int step = STEPPED ? __ldg(p.step) : 0;
  const int column = (L::PAIRED ? n0 / 2 : n0) + t * L::OUT_COLUMNS;
  if (column >= L::PITCH) return;
  float bias[COLUMNS], out_inverse = 0;
  int out_zero = 0;
  if constexpr (S::BIAS != Bias::NONE)
    load_columns<S, float4>(bias, p.bias + (S::BIAS == Bias::STEP ? (long long)step * L::N_PADDED : 0) + n0, t);
  if constexpr (L::CODES) {
    const int parameter = S::OUT_SCALES == Rows::STEP ? step : 0;
    out_inverse = __ldg(p.out_inverse + parameter), out_zero = __ldg(p.out_zero + parameter);
  }

  // Rows of the residual under way at once, since each comes from afar; odd ones take too many registers for that.
  constexpr int AHEAD = L::OUT_N % L::OUT_COLUMNS == 0 ? 4 : 1;
  u32 residual[AHEAD][L::OUT_COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < BLOCKS_M * 2; ++i) {
    const int row = m0 + i * 8 + lane / 4;
    if constexpr (S::RESIDUAL) {
      if (i % AHEAD == 0)
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
          load_residual<S>(residual[j], p.residual + (long long)min(row + j * 8, m - 1) * L::OUT_N, column);
    }
    if (row >= m) return;  // a branch for each row also keeps the compiler from running out of registers on all at once
    if constexpr (S::OUT == Out::S32) {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
        if (column + j < L::OUT_N)
          ((int*)p.out)[(long long)row * L::OUT_N + column + j] = values[i / 2][j / 2][i % 2 * 2 + j % 2];
    } else {
      float y[COLUMNS], out[L::OUT_COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        y[j] = values[i / 2][j / 2][i % 2 * 2 + j % 2];
        if constexpr (S::BIAS != Bias::NONE) y[j] = __fadd_rn(y[j], bias[j]);
      }
      activate<S>(out, y);
      if constexpr (S::RESIDUAL) {
#pragma unroll
        for (int j = 0; j < L::OUT_COLUMNS; ++j)
          out[j] = __fadd_rn(out[j], machine::to_float((u16)(residual[i % AHEAD][j / 2] >> j % 2 * 16)));
      }
      store<S>(p.out, row, column, out, out_inverse, out_zero);
    }
  }
}

}  // namespace epilogue
