// Sixteen floats at once, for AVX-512 and for AVX2: only this file, gemm.h and attention know the difference.
#pragma once
#include "abi.h"

#include <immintrin.h>
#include <cstring>
#include <type_traits>

constexpr int64_t LANES = 16;

inline float bf16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

#ifdef __AVX512F__

struct V {
  __m512 x;
};
struct VI {
  __m512i x;
};
inline V set(float a) { return {_mm512_set1_ps(a)}; }
inline V operator+(V a, V b) { return {_mm512_add_ps(a.x, b.x)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.x, b.x)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.x, b.x)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.x, b.x)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }  // a * b + c
inline V min(V a, V b) { return {_mm512_min_ps(a.x, b.x)}; }
inline V max(V a, V b) { return {_mm512_max_ps(a.x, b.x)}; }
inline V round(V a) { return {_mm512_roundscale_ps(a.x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V to_float(VI a) { return {_mm512_cvtepi32_ps(a.x)}; }
inline float sum(V a) { return _mm512_reduce_add_ps(a.x); }
inline float highest(V a) { return _mm512_reduce_max_ps(a.x); }
inline float lowest(V a) { return _mm512_reduce_min_ps(a.x); }
inline V abs(V a) { return {_mm512_abs_ps(a.x)}; }
inline V copy_sign(V size, V sign) {
  const __m512 bit = _mm512_set1_ps(-0.0f);
  return {_mm512_or_ps(_mm512_andnot_ps(bit, size.x), _mm512_and_ps(bit, sign.x))};
}
inline V scale_by_power_of_2(V a, V n) { return {_mm512_scalef_ps(a.x, n.x)}; }
inline VI load_i32(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline VI set_i32(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline VI operator-(VI a, VI b) { return {_mm512_sub_epi32(a.x, b.x)}; }
inline VI operator*(VI a, VI b) { return {_mm512_mullo_epi32(a.x, b.x)}; }

inline __mmask16 lanes(int64_t n) { return n >= LANES ? __mmask16(0xffff) : __mmask16((1u << n) - 1); }

// The first n of 16 lanes; the others are 0.
inline V load(const float* p, int64_t n = LANES) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline V load_bf16(const uint16_t* p, int64_t n = LANES) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), p)), 16))};
}
inline V load_u8(const uint8_t* p, int64_t n = LANES) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)))};
}
inline void store(float* p, V a, int64_t n = LANES) { _mm512_mask_storeu_ps(p, lanes(n), a.x); }
inline __m256i to_bf16(V a) {  // to nearest even; a NaN stays one
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(a.x);
#else
  const __m512i bits = _mm512_castps_si512(a.x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.x, a.x, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}
inline void store_bf16(uint16_t* p, V a, int64_t n = LANES) { _mm256_mask_storeu_epi16(p, lanes(n), to_bf16(a)); }
// Codes of values that have been multiplied by 1 / scale.
inline void store_codes(uint8_t* p, V a, V zero, int64_t n = LANES) {
  // Clamped as floats: a conversion of what no i32 holds gives the lowest one. A NaN becomes 0, as in torch.
  const V q = min(max(round(a) + zero, set(0)), set(255));
  _mm_mask_storeu_epi8(p, lanes(n), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(q.x)));
}

struct D {  // sixteen doubles
  __m512d x, y;
};
inline D widen(V a) {
  return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.x, 1))};
}
inline D load(const double* p) { return {_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8)}; }
inline void store(double* p, D a) {
  _mm512_storeu_pd(p, a.x);
  _mm512_storeu_pd(p + 8, a.y);
}
inline D operator+(D a, D b) { return {_mm512_add_pd(a.x, b.x), _mm512_add_pd(a.y, b.y)}; }
inline D fma(D a, D b, D c) { return {_mm512_fmadd_pd(a.x, b.x, c.x), _mm512_fmadd_pd(a.y, b.y, c.y)}; }
inline double sum(D a) { return _mm512_reduce_add_pd(_mm512_add_pd(a.x, a.y)); }

#else  // AVX2: two halves

struct V {
  __m256 x, y;
};
struct VI {
  __m256i x, y;
};
inline V set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline V operator+(V a, V b) { return {_mm256_add_ps(a.x, b.x), _mm256_add_ps(a.y, b.y)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.x, b.x), _mm256_sub_ps(a.y, b.y)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.x, b.x), _mm256_mul_ps(a.y, b.y)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.x, b.x), _mm256_div_ps(a.y, b.y)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.x, b.x, c.x), _mm256_fmadd_ps(a.y, b.y, c.y)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.x, b.x), _mm256_min_ps(a.y, b.y)}; }
inline V max(V a, V b) { return {_mm256_max_ps(a.x, b.x), _mm256_max_ps(a.y, b.y)}; }
inline V round(V a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.x, mode), _mm256_round_ps(a.y, mode)};
}
inline V to_float(VI a) { return {_mm256_cvtepi32_ps(a.x), _mm256_cvtepi32_ps(a.y)}; }
inline float sum(V a) {
  alignas(32) float f[8];
  _mm256_store_ps(f, _mm256_add_ps(a.x, a.y));
  return ((f[0] + f[4]) + (f[1] + f[5])) + ((f[2] + f[6]) + (f[3] + f[7]));
}
inline float highest(V a) {
  alignas(32) float f[8];
  _mm256_store_ps(f, _mm256_max_ps(a.x, a.y));
  float most = f[0];
  for (int i = 1; i < 8; ++i) most = f[i] > most ? f[i] : most;
  return most;
}
inline float lowest(V a) { return -highest(set(0) - a); }
inline V abs(V a) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(bit, a.x), _mm256_andnot_ps(bit, a.y)};
}
inline V copy_sign(V size, V sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  const V a = abs(size);
  return {_mm256_or_ps(a.x, _mm256_and_ps(bit, sign.x)), _mm256_or_ps(a.y, _mm256_and_ps(bit, sign.y))};
}
inline __m256 scale_half(__m256 a, __m256 n) {  // n within -126..127
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(power));
}
inline V scale_by_power_of_2(V a, V n) { return {scale_half(a.x, n.x), scale_half(a.y, n.y)}; }
inline VI load_i32(const int32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline VI set_i32(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
inline VI operator-(VI a, VI b) { return {_mm256_sub_epi32(a.x, b.x), _mm256_sub_epi32(a.y, b.y)}; }
inline VI operator*(VI a, VI b) { return {_mm256_mullo_epi32(a.x, b.x), _mm256_mullo_epi32(a.y, b.y)}; }

template <typename T> struct Sixteen {  // room for 16, of which the first n are read or written
  alignas(64) T of[LANES] = {};
};
inline V load(const float* p, int64_t n = LANES) {
  if (n >= LANES) return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
  Sixteen<float> room;
  std::memcpy(room.of, p, size_t(n) * 4);
  return {_mm256_load_ps(room.of), _mm256_load_ps(room.of + 8)};
}
inline V load_bf16(const uint16_t* p, int64_t n = LANES) {
  const auto half = [](const uint16_t* h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)h)), 16));
  };
  if (n >= LANES) return {half(p), half(p + 8)};
  Sixteen<uint16_t> room;
  std::memcpy(room.of, p, size_t(n) * 2);
  return {half(room.of), half(room.of + 8)};
}
inline V load_u8(const uint8_t* p, int64_t n = LANES) {
  const auto half = [](const uint8_t* h) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)h)));
  };
  if (n >= LANES) return {half(p), half(p + 8)};
  Sixteen<uint8_t> room;
  std::memcpy(room.of, p, size_t(n));
  return {half(room.of), half(room.of + 8)};
}
inline void store(float* p, V a, int64_t n = LANES) {
  if (n >= LANES) {
    _mm256_storeu_ps(p, a.x);
    _mm256_storeu_ps(p + 8, a.y);
    return;
  }
  Sixteen<float> room;
  _mm256_store_ps(room.of, a.x);
  _mm256_store_ps(room.of + 8, a.y);
  std::memcpy(p, room.of, size_t(n) * 4);
}
inline void store_bf16(uint16_t* p, V a, int64_t n = LANES) {
  const auto half = [](__m256 f) {
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  };
  const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(half(a.x), half(a.y)), 0xd8);
  if (n >= LANES) return _mm256_storeu_si256((__m256i*)p, both);
  Sixteen<uint16_t> room;
  _mm256_store_si256((__m256i*)room.of, both);
  std::memcpy(p, room.of, size_t(n) * 2);
}
inline void store_codes(uint8_t* p, V a, V zero, int64_t n = LANES) {
  const V q = min(max(round(a) + zero, set(0)), set(255));
  const __m256i wide = _mm256_packus_epi32(_mm256_cvtps_epi32(q.x), _mm256_cvtps_epi32(q.y));
  const __m256i words = _mm256_permute4x64_epi64(wide, 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (n >= LANES) return _mm_storeu_si128((__m128i*)p, bytes);
  Sixteen<uint8_t> room;
  _mm_store_si128((__m128i*)room.of, bytes);
  std::memcpy(p, room.of, size_t(n));
}

struct D {
  __m256d of[4];
};
inline D widen(V a) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(a.x)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.x, 1)),
          _mm256_cvtps_pd(_mm256_castps256_ps128(a.y)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.y, 1))};
}
inline D load(const double* p) {
  return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4), _mm256_loadu_pd(p + 8), _mm256_loadu_pd(p + 12)};
}
inline void store(double* p, D a) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, a.of[i]);
}
inline D operator+(D a, D b) {
  for (int i = 0; i < 4; ++i) a.of[i] = _mm256_add_pd(a.of[i], b.of[i]);
  return a;
}
inline D fma(D a, D b, D c) {
  for (int i = 0; i < 4; ++i) c.of[i] = _mm256_fmadd_pd(a.of[i], b.of[i], c.of[i]);
  return c;
}
inline double sum(D a) {
  alignas(32) double f[4];
  _mm256_store_pd(f, _mm256_add_pd(_mm256_add_pd(a.of[0], a.of[1]), _mm256_add_pd(a.of[2], a.of[3])));
  return (f[0] + f[1]) + (f[2] + f[3]);
}

#endif

// exp(x) for x up to 88, relative error below 2.2e-7 where the result is normal; 2^-126 below -87.
inline V exp(V x) {
  x = max(x, set(-87.0f));
  constexpr float MAGIC = 12582912;  // 1.5 * 2^23, beside which there is room for whole numbers only
  const V n = fma(x, set(1.44269504f), set(MAGIC)) - set(MAGIC);
  const V r = fma(n, set(-1.42860677e-6f), fma(n, set(-0.693145752f), x));
  // 1 + r + .. + r^5 in pairs, which wait for each other less than one after the other would.
  const V low = fma(r, set(0.166671157f), set(0.499992311f)), high = fma(r, set(8.31250101e-3f), set(4.18903306e-2f));
  return scale_by_power_of_2(fma(fma(high, r * r, low), r * r, r + set(1)), n);
}

// In `max(constant, x)` a NaN stays, in `max(x, constant)` it becomes the constant; likewise `min`.

// As good as 0 where exp(-x) would be beyond its limit; likewise gelu_tanh.
inline V silu(V x) {
  x = max(set(-87), x);
  return x / (set(1) + exp(set(0) - x));
}

// max(x, 0) - |x| * (1 - erf(|x| / sqrt(2))) / 2, with the error function of Abramowitz and Stegun, 7.1.26: absolute
// error below 1e-7 * (1 + |x|). From |x| = 14 on it is x or 0.
inline V gelu(V x) {
  const V a = min(set(14), abs(x)), t = set(1) / fma(a, set(0.231641888f), set(1));
  const V low = fma(t, set(-0.142248368f), set(0.127414796f));
  const V high = fma(t * t, set(0.530702715f), fma(t, set(-0.726576014f), set(0.710706871f)));
  return max(set(0), x) - a * t * fma(high, t * t, low) * exp(set(-0.5f) * a * a);
}

// x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
inline V gelu_tanh(V x) {
  x = max(set(-10), x);
  return x / (set(1) + exp(x * fma(set(-0.0713548163f) * x, x, set(-1.59576912f))));
}

inline V activate(V x, int32_t act) {
  switch (act) {
    case SILU: return silu(x);
    case GELU: return gelu(x);
    case GELU_TANH: return gelu_tanh(x);
    default: return x;
  }
}

// Calls f with the activation as a constant, so that a loop in f does not ask for it again and again.
template <typename F> inline void with_act(int32_t act, F f) {
  switch (act) {
    case SILU: return f(std::integral_constant<int32_t, SILU>());
    case GELU: return f(std::integral_constant<int32_t, GELU>());
    case GELU_TANH: return f(std::integral_constant<int32_t, GELU_TANH>());
    case GEGLU: return f(std::integral_constant<int32_t, GEGLU>());
    default: return f(std::integral_constant<int32_t, NONE>());
  }
}

inline V load_as(const void* p, int32_t dtype, int64_t i, int64_t n = LANES) {
  switch (dtype) {
    case F32: return load((const float*)p + i, n);
    case BF16: return load_bf16((const uint16_t*)p + i, n);
    default: return load_u8((const uint8_t*)p + i, n);
  }
}

// inverse and zero belong to U8 alone.
inline void store_as(void* p, int32_t dtype, int64_t i, V a, V inverse, V zero, int64_t n = LANES) {
  switch (dtype) {
    case F32: return store((float*)p + i, a, n);
    case BF16: return store_bf16((uint16_t*)p + i, a, n);
    default: return store_codes((uint8_t*)p + i, a * inverse, zero, n);
  }
}

// What store_as needs for entry b, token s; nothing if there is no scale, as when values are not stored as codes.
struct Codes {
  V inverse = set(0), zero = set(0);
  Codes(const Quant& quant, const int64_t* rows, int64_t b, int64_t s) {
    if (quant.scale.base == nullptr) return;
    inverse = set(1 / *quant.scale.at(rows, b, s));
    zero = set(float(*quant.zero.at(rows, b, s)));
  }
};

// Calls f(i, lanes) for i = 0, 16, 32 .. below n; lanes is a constant but for the last.
template <typename F> inline void each_vector(int64_t n, F f) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) f(i, LANES);
  if (i < n) f(i, n - i);
}

inline size_t bytes_of(int32_t dtype) { return dtype == F32 ? 4 : dtype == BF16 ? 2 : 1; }

// This thread's share [begin, end) of n things, in steps of `grain`.
struct Share {
  int64_t begin, end;
  Share(const Team& team, int64_t n, int64_t grain = 1) {
    const int64_t grains = (n + grain - 1) / grain;
    begin = grains * team.id / team.count * grain;
    end = grains * (team.id + 1) / team.count * grain;
    if (end > n) end = n;
  }
};

// Pieces of a thread's scratch memory, one after the other, each on a cache line of its own.
struct Scratch {
  uint8_t* next;
  const uint8_t* end;
  explicit Scratch(const Team& team) : next(team.scratch), end(team.scratch + team.scratch_size) {}
  template <typename T> T* take(int64_t count) {
    T* piece = (T*)next;
    next += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    TFQC_ASSERT(count >= 0 && next <= end);
    return piece;
  }
};
