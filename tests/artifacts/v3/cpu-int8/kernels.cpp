// Runs a schedule: one parallel region, in which all threads walk through the commands together.
// What the schedule hands to a kernel. `tfqc/backends/cpu_int8/abi.py` mirrors these structs field by field.
//
// Values lie in memory as [batch, seq, channels], channels last: an image is seq = height * width. Every kernel is run
// by all threads of a team at once and does its own share; the caller puts a barrier behind each.
#include <cstddef>
#include <cstdint>

// What a debug build (TFQC_KERNEL_CHECKS) asserts of what kernels are told and of the memory that they take; else nothing.

#ifdef TFQC_CHECK
#include <cstdio>
#include <cstdlib>
#define TFQC_ASSERT(it)                                              \
  do {                                                               \
    if (!(it)) {                                                     \
      std::fprintf(stderr, "tfqc kernels: %s does not hold\n", #it); \
      std::abort();                                                  \
    }                                                                \
  } while (false)
#else
#define TFQC_ASSERT(it)
#endif

enum DType : int32_t { F32 = 0, BF16 = 1, U8 = 2 };
enum Act : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, GEGLU = 4 };

// Parameters that may wait for the step, the batch entry or the token: of entry b, token s they begin at
// base + rows[b] * row + b * entry + s * token. A null base stands for "there is none". size: how many numbers lie
// from base on, of which a debug build makes sure; 0 if it is not said.
template <typename T> struct Rows {
  const T* base;
  int64_t row, entry, token, size;
  const T* at(const int64_t* rows, int64_t b, int64_t s = 0) const {
    const int64_t place = rows[b] * row + b * entry + s * token;
    TFQC_ASSERT(place >= 0 && (size == 0 || place < size));
    return base + place;
  }
};

// Codes q = clamp(rne(x * (1 / scale)) + zero, 0, 255); x = (q - zero) * scale. One scale and zero for each `at`.
struct Quant {
  Rows<float> scale;
  Rows<int32_t> zero;
};

// The threads that run a kernel together. rows: which row of the schedule each batch entry is at, [batch].
// scratch: memory of this thread alone, 64-byte aligned; shared: memory of the team.
struct Team {
  int32_t id, count;
  const int64_t* rows;
  uint8_t* scratch;
  int64_t scratch_size;
  uint8_t* shared;
  int64_t shared_size;
  void (*wait)(const Team*);
  void barrier() const { wait(this); }
};

// What follows an integer product: y = act(acc * (scale_x * scale_w) + bias); y *= gate; y += residual; y is stored
// as dtype, U8 by `quant`. Leading dimensions are in elements. With GEGLU the columns of the product come in pairs of
// blocks of 16, value and gate: y = value * gelu(gate), and there are half as many outputs.
struct Epilogue {
  Rows<float> bias, gate;
  const void* residual;
  void* out;
  int64_t residual_ld, out_ld;
  int32_t residual_dtype, out_dtype, act, unused;
  Quant quant;
};

// out[b, s, n] from codes x[b, s, k] and weights [n, k]. Packed weights: [ceil(n / 16)][ceil(k / 64)][16][16][4], that
// is blocks of 16 outputs, in them blocks of 64 inputs, in them 16 groups of 4 inputs for each of the 16 outputs; what
// is beyond n or k is zero. weight_sum[n] = sum over k of weight[n, k]; both it and weight_scale have ceil(n/16)*16.
struct LinearArgs {
  const uint8_t* x;
  int64_t ldx, batch, seq, k, n;
  Quant quant;
  const int8_t* weight;
  const float* weight_scale;
  const int32_t* weight_sum;
  Epilogue epilogue;
};

// A convolution of x [b, h, w, c]; k runs over (ky, kx, c / groups). The inputs of each tap are padded to a multiple of
// 64; where c / groups is less than 64, those of all taps of one ky together. Padding of the image reads as the zero
// point. weight is [groups] of what LinearArgs has, with n / groups outputs each; so are weight_scale and weight_sum.
struct ConvArgs {
  const uint8_t* x;
  int64_t batch, h, w, c, n, kh, kw, stride, pad, groups, out_h, out_w;
  Quant quant;
  const int8_t* weight;
  const float* weight_scale;
  const int32_t* weight_sum;
  Epilogue epilogue;
};

// y = act((x - mean) * rstd * weight + bias) of x [batch, seq, c]: group norm over seq and c / groups, layer norm
// (groups = 0) over c.
struct NormArgs {
  const void* x;
  void* out;
  int64_t batch, seq, c, groups;
  Rows<float> weight, bias;
  float eps;
  int32_t x_dtype, out_dtype, act;
  Quant quant;
};

// out = quantize(act(x)); with GEGLU x has 2 * c channels, value then gate. out_dtype F32 or BF16 stores act(x) as is.
struct MapArgs {
  const void* x;
  void* out;
  int64_t batch, seq, c, ldx;
  int32_t x_dtype, out_dtype, act, unused;
  Quant quant;
};

// Codes, scale and zero point of each token: asymmetric, 8 bits, as tfqc.quantize_dynamic has it.
struct TokenQuantizeArgs {
  const void* x;
  uint8_t* out;
  float* scale;
  int32_t* zero;
  int64_t tokens, c;
  int32_t x_dtype, unused;
};

// out = a * gate + b, element by element over [batch, seq, c]; b may be null. Entry strides in elements, 0 to repeat.
struct AddArgs {
  const void *a, *b;
  void* out;
  int64_t batch, seq, c, a_entry, b_entry;
  Rows<float> gate;
  int32_t a_dtype, b_dtype, out_dtype, unused;
  Quant quant;
};

// Rows of several bytes: out[i] = (a[i], b[i]) along channels, [tokens, c] and [tokens, c2], converted to out_dtype.
struct ConcatArgs {
  const void *a, *b;
  void* out;
  int64_t tokens, c, c2;
  int32_t a_dtype, b_dtype, out_dtype, unused;
};

// Nearest-neighbour enlargement of [batch, h, w, pixel_bytes] by an integer factor.
struct UpsampleArgs {
  const void* x;
  void* out;
  int64_t batch, h, w, pixel_bytes, factor;
};

// softmax(q k^T * scale + mask) v for each head; element strides of entry, token and head; head dimension d is dense.
// mask: f32 with strides of entry, head, query, key (0 to repeat), or null. mode: 0 all in f32, 1 bf16 products,
// 2 int8 q k^T with the mean of k taken off, and 16-bit probabilities times v.
struct AttentionArgs {
  const void *q, *k, *v;
  const float* mask;
  void* out;
  int64_t batch, heads, queries, keys, d;
  int64_t q_entry, q_token, q_head, k_entry, k_token, k_head, v_entry, v_token, v_head;
  int64_t mask_entry, mask_head, mask_query, mask_key;
  int64_t out_entry, out_token, out_head;
  float scale;
  int32_t q_dtype, k_dtype, v_dtype, out_dtype, mode;
  Quant quant;
};

// One line of a schedule, and the schedule.
struct Command {
  void (*run)(const void* args, const Team& team);
  const void* args;
};

#include <atomic>
#include <omp.h>
#include <sched.h>

namespace {

struct alignas(64) Gate {
  std::atomic<int32_t> arrived{0};
  std::atomic<int32_t> round{0};
};

thread_local Gate* gate_of_team = nullptr;

// Threads of a team wait for each other often and briefly, so they spin first and give the core away later.
void wait_for_team(const Team* team) {
  if (team->count == 1) return;
  Gate& gate = *gate_of_team;
  const int32_t round = gate.round.load(std::memory_order_relaxed);
  if (gate.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == team->count) {
    gate.arrived.store(0, std::memory_order_relaxed);
    gate.round.store(round + 1, std::memory_order_release);
    return;
  }
  for (int spins = 0; gate.round.load(std::memory_order_acquire) == round; ++spins) {
    if (spins < 4000) {
      __builtin_ia32_pause();
    } else {
      sched_yield();
    }
  }
}

}  // namespace

// scratch: `threads` pieces of scratch_size bytes. Runs with at most `threads` threads.
extern "C" void tfqc_run(const Command* commands, int64_t count, const int64_t* rows, int32_t threads,
                         uint8_t* scratch, int64_t scratch_size, uint8_t* shared, int64_t shared_size) {
  Gate gate;
#pragma omp parallel num_threads(threads)
  {
    gate_of_team = &gate;
    const int32_t id = omp_get_thread_num();
    Team team{id, omp_get_num_threads(), rows, scratch + id * scratch_size, scratch_size, shared, shared_size,
              wait_for_team};
    for (int64_t i = 0; i < count; ++i) {
      commands[i].run(commands[i].args, team);
      team.barrier();
    }
  }
}
// Convolutions: each thread copies some rows of the image with their surroundings, padded by the zero point. In that
// patch the inputs of neighbouring outputs lie at the same distance for every tap, so its pixels are multiplied where
// they are.
// The product of u8 codes and packed s8 weights, and what follows it, for one thread. Linear layers and convolutions
// differ only in where a tile of 16 rows lies in memory. Exact: no sum is ever rounded or saturated, and it becomes a
// float, to nearest even, when the zero point's part has been taken off.
// Sixteen floats at once, for AVX-512 and for AVX2: only this file, gemm.h and attention know the difference.

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

#include <algorithm>
#include <cmath>
#include <sys/syscall.h>
#include <unistd.h>

namespace gemm {

constexpr int64_t TILE = 16;         // rows or columns
constexpr int64_t STRIP = 2 * TILE;  // rows multiplied at once
constexpr int64_t PANEL = 2 * TILE;  // columns multiplied at once
constexpr int64_t STEP = 64;         // inputs
constexpr int64_t TILE_BYTES = TILE * STEP;

constexpr int64_t BLOCK_BYTES = 1 << 20;  // of codes that one thread works on: half of the second level cache
constexpr int64_t MOST_ROWS = 1024;       // in a block
constexpr int64_t CHUNK = 16;             // steps, about: as much of a panel as stays in the first level cache
// Of 2^16 inputs, any sum of (code - zero point) * weight is below 2^31: each is at most 255 * 128.
constexpr int64_t MOST_STEPS = (1 << 16) / STEP;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Bytes between rows, an odd number of cache lines: any 64 neighbours lie in different sets of the cache.
inline int64_t pitch_of(int64_t bytes) { return (ceil_div(bytes, 64) | 1) * 64; }

// What is special about a row of the product: parameters, and which row of the output it is (none if negative).
// alike: how many rows from this one on follow each other in the output and share their parameters.
struct Row {
  float scale, inverse, out_zero;
  int32_t zero;
  const float *bias, *gate;
  int64_t at, alike;
};

template <typename T> const T* at_or_null(const Rows<T>& p, const int64_t* rows, int64_t b, int64_t s) {
  return p.base ? p.at(rows, b, s) : nullptr;
}

inline Row row_of(const Quant& x, const Epilogue& e, const int64_t* rows, int64_t b, int64_t s) {
  Row row{*x.scale.at(rows, b, s), 0, 0, *x.zero.at(rows, b, s), at_or_null(e.bias, rows, b, s),
          at_or_null(e.gate, rows, b, s), 0, 1};
  if (e.out_dtype == U8) {
    row.inverse = 1 / *e.quant.scale.at(rows, b, s);
    row.out_zero = float(*e.quant.zero.at(rows, b, s));
  }
  return row;
}

// The rows of tokens [s, s + count) of entry b, the first of which is row `at` of the output.
inline void describe(Row* out, int64_t count, const Quant& x, const Epilogue& e, const int64_t* rows, int64_t b,
                     int64_t s, int64_t at) {
  const bool same = !(x.scale.token | x.zero.token | e.bias.token | e.gate.token | e.quant.scale.token |
                      e.quant.zero.token);
  Row row = row_of(x, e, rows, b, s);
  for (int64_t i = 0; i < count; ++i) {
    if (!same) row = row_of(x, e, rows, b, s + i);
    row.at = at + i;
    row.alike = same ? count - i : 1;
    out[i] = row;
  }
}

// Weights, packed as LinearArgs has them, and what belongs to their columns. first: the output that column 0 makes.
struct Weights {
  const int8_t* codes;
  const float* scale;
  const int32_t* sum;
  int64_t n, steps, first;
  const Epilogue* epilogue;
  int64_t column_bytes() const { return steps * TILE_BYTES; }  // of 16 columns
};

// Rows to multiply, in tiles: input i of row r of tile t is codes[tiles[t] + r * pitch + steps[i / 64] + i % 64].
struct Block {
  const uint8_t* codes;
  int64_t bytes, pitch, tile_count;
  const int64_t *tiles, *steps;
  const Row* rows;
};

#ifdef __AVX512F__

// gelu(x) = max(x, 0) - g(|x|) with g(a) = a * (1 - Phi(a)) in 32 cubics, each around its sixth; error below 5e-7.
struct GeluTable {
  alignas(64) float c[4][32];
  GeluTable() {
    for (int i = 0; i < 32; ++i) {
      double x[4], y[4];  // Chebyshev nodes, and divided differences of g there
      for (int j = 0; j < 4; ++j) {
        x[j] = 0.5 * std::cos((2 * j + 1) * M_PI / 8);
        const double a = (i + x[j]) / 6;
        y[j] = a * 0.5 * std::erfc(a * M_SQRT1_2);
      }
      for (int order = 1; order < 4; ++order) {
        for (int j = 3; j >= order; --j) y[j] = (y[j] - y[j - 1]) / (x[j] - x[j - order]);
      }
      double p[4] = {y[3], 0, 0, 0};
      for (int j = 2; j >= 0; --j) {  // p = p * (u - x[j]) + y[j]
        for (int power = 3; power > 0; --power) p[power] = p[power - 1] - x[j] * p[power];
        p[0] = y[j] - x[j] * p[0];
      }
      for (int power = 0; power < 4; ++power) c[power][i] = float(p[power]);
    }
  }
};
const GeluTable gelu_table;

inline V fast_gelu(V x) {
  const V place = min(abs(x) * set(6), set(31.4f)), shifted = place + set(8388608);  // 2^23: rounds to an integer
  const V u = place - (shifted - set(8388608));
  const __m512i i = _mm512_castps_si512(shifted.x);
  const auto c = [i](int power) {
    const float* of = gelu_table.c[power];
    return V{_mm512_permutex2var_ps(_mm512_load_ps(of), i, _mm512_load_ps(of + 16))};
  };
  return max(set(0), x) - fma(fma(fma(c(3), u, c(2)), u, c(1)), u, c(0));
}

#else

inline V fast_gelu(V x) { return gelu(x); }

#endif

// Turns sums [2][STRIP][TILE] of a strip into outputs, a few rows at a time, so that it can be done meanwhile.
// centred: the sums are floats, and the zero point's part has been taken off.
class Finisher {
 public:
  static constexpr int64_t FEW = 4;

  explicit Finisher(const Weights& weights, bool centred = false)
      : w(weights), e(*weights.epilogue), centred(centred) {}

  void begin(const int32_t* strip_sums, const Row* strip_rows, int64_t count, int64_t first_column) {
    sums = strip_sums;
    rows = strip_rows;
    next = 0;
    end = count;
    column = first_column;
  }

  // FEW rows or more. Not inline: the loop that calls it needs its registers.
  __attribute__((noinline, noclone)) void advance(int64_t count) {
    const int64_t stop = std::min(end, next + count);
    while (next < stop) {
      const Row& row = rows[next];
      if (row.at >= 0 && row.alike >= FEW && next + FEW <= end) {
        finish<FEW>(row, sums + next * TILE);
        next += FEW;
      } else {
        if (row.at >= 0) finish<1>(row, sums + next * TILE);
        ++next;
      }
    }
  }

  void complete() { advance(end - next); }
  int64_t remaining() const { return end - next; }

 private:
  template <int64_t R> void finish(const Row& row, const int32_t* left) const {
    const int32_t* right = left + STRIP * TILE;
    V y[R], z[R];
    if (e.act == GEGLU) {
      multiply_out<R>(y, left, row, column, TILE);
      multiply_out<R>(z, right, row, column + TILE, TILE);
      for (int64_t r = 0; r < R; ++r) y[r] = y[r] * fast_gelu(z[r]);
      put<R>(row, y, column / 2, TILE);
    } else if (column + PANEL <= w.n) {
      multiply_out<R>(y, left, row, column, TILE);
      put<R>(row, y, column, TILE);
      multiply_out<R>(y, right, row, column + TILE, TILE);
      put<R>(row, y, column + TILE, TILE);
    } else {
      edge<R>(row, left, column);
      edge<R>(row, right, column + TILE);
    }
  }

  template <int64_t R> void edge(const Row& row, const int32_t* sum, int64_t i) const {
    const int64_t width = std::min(TILE, w.n - i);
    if (width <= 0) return;
    V y[R];
    multiply_out<R>(y, sum, row, i, width);
    put<R>(row, y, i, width);
  }

  // Within `finish` with all that it calls: rows stay in registers.
  template <int64_t R>
  __attribute__((always_inline)) void multiply_out(V* y, const int32_t* sum, const Row& row, int64_t i,
                                                   int64_t width) const {
    const VI shift = set_i32(row.zero) * load_i32(w.sum + i);
    const V scale = set(row.scale) * load(w.scale + i);
    const V bias = row.bias ? load(row.bias + w.first + i, width) : set(0);
    for (int64_t r = 0; r < R; ++r) {
      // What is left fits into 32 bits, however often the sums have gone beyond them.
      y[r] = centred ? load((const float*)sum + r * TILE) : to_float(load_i32(sum + r * TILE) - shift);
      y[r] = fma(y[r], scale, bias);
    }
    if (e.act == NONE || e.act == GEGLU) return;
    for (int64_t r = 0; r < R; ++r) y[r] = e.act == GELU ? fast_gelu(y[r]) : activate(y[r], e.act);
  }

  template <int64_t R> __attribute__((always_inline)) void put(const Row& row, V* y, int64_t i, int64_t width) const {
    i += w.first;
    if (row.gate) {
      const V gate = load(row.gate + i, width);
      for (int64_t r = 0; r < R; ++r) y[r] = y[r] * gate;
    }
    if (e.residual) {
      const int64_t at = row.at * e.residual_ld + i;
      for (int64_t r = 0; r < R; ++r) {
        y[r] = y[r] + load_as(e.residual, e.residual_dtype, at + r * e.residual_ld, width);
      }
    }
    const int64_t at = row.at * e.out_ld + i;
    const V inverse = set(row.inverse), zero = set(row.out_zero);
    for (int64_t r = 0; r < R; ++r) store_as(e.out, e.out_dtype, at + r * e.out_ld, y[r], inverse, zero, width);
  }

  const Weights& w;
  const Epilogue& e;
  const bool centred;
  const int32_t* sums = nullptr;
  const Row* rows = nullptr;
  int64_t next = 0, end = 0, column = 0;
};

// One strip times one panel over some steps. Tiles and columns that are not there repeat the first.
struct Operands {
  const uint8_t* a[2];
  int64_t pitch;
  const int64_t* steps;
  const int8_t* b[2];
  int64_t count;       // of steps
  const int8_t* soon;  // weights to fetch meanwhile, of each step these lines of 64 bytes in two tiles; or null
  int64_t soon_bytes, soon_begin, soon_end;
};

#if defined(__AMX_INT8__)

struct alignas(64) Tiles {  // the eight tile registers, for as long as it lives
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  Tiles() {
    constexpr int request_permission = 0x1023, tile_data = 18;
    static const long granted [[maybe_unused]] = syscall(SYS_arch_prctl, request_permission, tile_data);
    _tile_loadconfig(this);
  }
  ~Tiles() { _tile_release(); }
};

// sums = a * b (+ sums). What `finisher` still reads from sums is finished meanwhile: the matrix unit works by itself.
template <bool TWO> void multiply(const Operands& o, int32_t* sums, bool add, Finisher& finisher) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what they read
  if (add) {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 512, 64);
    if (TWO) _tile_loadd(2, sums + 256, 64);
    if (TWO) _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint8_t *a0 = o.a[0], *a1 = o.a[1];
  const int8_t *b0 = o.b[0], *b1 = o.b[1], *soon = o.soon;
  const int64_t *steps = o.steps, pitch = o.pitch, count = o.count;
  const int64_t pace = round_up(ceil_div(finisher.remaining(), o.count), Finisher::FEW);
  for (int64_t i = 0; i < count; ++i, b0 += TILE_BYTES, b1 += TILE_BYTES, soon += TILE_BYTES) {
    _tile_stream_loadd(4, a0 + steps[i], pitch);
    _tile_loadd(6, b0, 64);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbusd(1, 4, 7);
    if (TWO) {
      _tile_stream_loadd(5, a1 + steps[i], pitch);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    for (int64_t line = o.soon_begin; line < o.soon_end; ++line) {
      _mm_prefetch(soon + line / TILE * o.soon_bytes + line % TILE * 64, _MM_HINT_T1);
    }
    if (finisher.remaining()) finisher.advance(pace);
  }
  finisher.complete();
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 512, 64);
  if (TWO) _tile_stored(2, sums + 256, 64);
  if (TWO) _tile_stored(3, sums + 768, 64);
}

#else

struct Tiles {
  ~Tiles() {}  // so that a variable of it counts as used
};

#if defined(__AVX512VNNI__)

constexpr int64_t BAND = 8;  // rows whose sums are in registers

inline void multiply_band(const Operands& o, const uint8_t* a, int32_t* sums, bool add) {
  __m512i left[BAND], right[BAND];
  for (int64_t r = 0; r < BAND; ++r) {
    left[r] = add ? _mm512_loadu_si512(sums + r * TILE) : _mm512_setzero_si512();
    right[r] = add ? _mm512_loadu_si512(sums + (STRIP + r) * TILE) : _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < o.count; ++i) {
    const uint8_t* x = a + o.steps[i];
    for (int64_t group = 0; group < STEP; group += 4) {
      const __m512i b0 = _mm512_loadu_si512(o.b[0] + i * TILE_BYTES + group * TILE);
      const __m512i b1 = _mm512_loadu_si512(o.b[1] + i * TILE_BYTES + group * TILE);
#pragma GCC unroll 8
      for (int64_t r = 0; r < BAND; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * o.pitch + group, 4);
        const __m512i codes = _mm512_set1_epi32(four);
        left[r] = _mm512_dpbusd_epi32(left[r], codes, b0);
        right[r] = _mm512_dpbusd_epi32(right[r], codes, b1);
      }
    }
  }
  for (int64_t r = 0; r < BAND; ++r) {
    _mm512_storeu_si512(sums + r * TILE, left[r]);
    _mm512_storeu_si512(sums + (STRIP + r) * TILE, right[r]);
  }
}

#else

constexpr int64_t BAND = 4;

// Eight columns, as pairs of sums of two products of 16 bits: the instruction for bytes would saturate.
inline void multiply_eight(const Operands& o, const uint8_t* a, const int8_t* b, int32_t* sums, bool add) {
  __m256i low[BAND], high[BAND];
  for (int64_t r = 0; r < BAND; ++r) low[r] = high[r] = _mm256_setzero_si256();
  for (int64_t i = 0; i < o.count; ++i) {
    const uint8_t* x = a + o.steps[i];
    for (int64_t group = 0; group < STEP; group += 4) {
      const auto* weights = (const __m128i*)(b + i * TILE_BYTES + group * TILE);
      const __m256i b0 = _mm256_cvtepi8_epi16(_mm_loadu_si128(weights));
      const __m256i b1 = _mm256_cvtepi8_epi16(_mm_loadu_si128(weights + 1));
#pragma GCC unroll 4
      for (int64_t r = 0; r < BAND; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * o.pitch + group, 4);
        const __m256i codes = _mm256_cvtepu8_epi16(_mm_set1_epi32(four));
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(codes, b0));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(codes, b1));
      }
    }
  }
  for (int64_t r = 0; r < BAND; ++r) {
    auto* out = (__m256i*)(sums + r * TILE);
    const __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(low[r], high[r]), 0xd8);
    _mm256_storeu_si256(out, add ? _mm256_add_epi32(_mm256_loadu_si256(out), sum) : sum);
  }
}

inline void multiply_band(const Operands& o, const uint8_t* a, int32_t* sums, bool add) {
  for (int64_t half = 0; half < 4; ++half) {
    const int64_t tile = half / 2, eight = half % 2 * 8;
    multiply_eight(o, a, o.b[tile] + eight * 4, sums + tile * STRIP * TILE + eight, add);
  }
}

#endif

template <bool TWO> void multiply(const Operands& o, int32_t* sums, bool add, Finisher& finisher) {
  finisher.complete();
  for (int64_t r = 0; r < (TWO ? STRIP : TILE); r += BAND) {
    multiply_band(o, o.a[r / TILE] + r % TILE * o.pitch, sums + r * TILE, add);
  }
}

#endif

// multiply_block where 32 bits may not hold a sum: it is taken over MOST_STEPS at a time, and these are added in 64.
__attribute__((noinline)) inline void multiply_long_block(const Weights& w, const Block& block, int64_t begin,
                                                          int64_t end, int32_t* sums) {
  constexpr int64_t SIDE = STRIP * TILE;  // from the sums of the left half of a panel to those of the right
  Finisher nothing(w), finisher(w, true);
  int64_t wide[2][TILE * TILE];
  alignas(64) float done[2 * SIDE];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * PANEL, sides = column + TILE < w.n ? 2 : 1;
    const int8_t* left = w.codes + panel * 2 * w.column_bytes();
    const int8_t* right = sides == 2 ? left + w.column_bytes() : left;
    for (int64_t tile = 0; tile < block.tile_count; ++tile) {
      const uint8_t* top = block.codes + block.tiles[tile];
      const Row* rows = block.rows + tile * TILE;
      std::fill_n(wide[0], 2 * TILE * TILE, 0);
      for (int64_t from = 0; from < w.steps; from += MOST_STEPS) {
        const int64_t skip = from * TILE_BYTES, count = std::min(MOST_STEPS, w.steps - from);
        const Operands operands{{top, top}, block.pitch, block.steps + from, {left + skip, right + skip}, count,
                                left, 0, 0, 0};
        multiply<false>(operands, sums, false, nothing);
        for (int64_t side = 0; side < sides; ++side) {
          for (int64_t i = 0; i < TILE * TILE; ++i) wide[side][i] += sums[side * SIDE + i];
        }
      }
      for (int64_t side = 0; side < sides; ++side) {
        const int32_t* sum = w.sum + column + side * TILE;
        for (int64_t i = 0; i < TILE * TILE; ++i) {
          if (rows[i / TILE].at < 0) continue;
          done[side * SIDE + i] = float(wide[side][i] - int64_t(rows[i / TILE].zero) * sum[i % TILE]);
        }
      }
      finisher.begin((const int32_t*)done, rows, TILE, column);
      finisher.complete();
    }
  }
}

// That tiles lie in the codes' memory, to the last byte that is multiplied.
inline void check([[maybe_unused]] const Weights& w, const Block& block) {
  for (int64_t t = 0; t < block.tile_count; ++t) {
    TFQC_ASSERT(block.tiles[t] >= 0);
    TFQC_ASSERT(block.tiles[t] + (TILE - 1) * block.pitch + block.steps[w.steps - 1] + STEP <= block.bytes);
  }
}

// The panels [begin, end) of a block. sums: room for STRIP * PANEL numbers for each strip of the block.
inline void multiply_block(const Weights& w, const Block& block, int64_t begin, int64_t end, int32_t* sums) {
  check(w, block);
  if (w.steps > MOST_STEPS) return multiply_long_block(w, block, begin, end, sums);
  Finisher finisher(w);
  const int64_t strips = ceil_div(block.tile_count, 2), chunks = std::max<int64_t>(1, (w.steps + CHUNK / 2) / CHUNK);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * PANEL;
    const int8_t* left = w.codes + panel * 2 * w.column_bytes();
    const int8_t* right = column + TILE < w.n ? left + w.column_bytes() : left;
    const bool more = panel + 1 < end && column + PANEL + TILE < w.n;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t from = w.steps * chunk / chunks, to = w.steps * (chunk + 1) / chunks, skip = from * TILE_BYTES;
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t tiles = std::min<int64_t>(2, block.tile_count - 2 * strip);
        const uint8_t* top = block.codes + block.tiles[2 * strip];
        const uint8_t* bottom = tiles == 2 ? block.codes + block.tiles[2 * strip + 1] : top;
        const Operands operands{{top, bottom}, block.pitch, block.steps + from, {left + skip, right + skip},
                                to - from, left + 2 * w.column_bytes() + skip, w.column_bytes(),
                                more ? strip * 2 * TILE / strips : 0, more ? (strip + 1) * 2 * TILE / strips : 0};
        int32_t* strip_sums = chunks > 1 ? sums + strip * STRIP * PANEL : sums;
        if (tiles == 2) {
          multiply<true>(operands, strip_sums, chunk > 0, finisher);
        } else {
          multiply<false>(operands, strip_sums, chunk > 0, finisher);
        }
        if (chunk + 1 == chunks) finisher.begin(strip_sums, block.rows + strip * STRIP, tiles * TILE, column);
      }
    }
  }
  finisher.complete();
}

// This thread's part of a grid of rows and panels.
struct Part {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// Splits units of rows and panels over the team so that the sum of the time to multiply and to fetch is least, by the
// rates of a core with AMX: 1024 products of bytes and 10 bytes from the third level cache in a cycle.
inline Part part_of(const Team& team, int64_t units, int64_t rows_per_unit, int64_t block_rows, int64_t panels) {
  int64_t across = 1;  // parts of the panels
  double least = 1e30;
  for (int64_t split = 1; split <= team.count; ++split) {
    if (team.count % split) continue;
    const double rows = double(ceil_div(units, team.count / split) * rows_per_unit);
    const double columns = double(ceil_div(panels, split) * PANEL);
    const double passes = std::max(1.0, rows / double(block_rows));
    const double cost = rows * columns / 1024 + (rows + passes * columns) / 10;
    if (cost < least) least = cost, across = split;
  }
  const int64_t down = team.count / across, i = team.id / across, j = team.id % across;
  return {units * i / down, units * (i + 1) / down, panels * j / across, panels * (j + 1) / across};
}

// What every product is told.
inline void check([[maybe_unused]] const Epilogue& e, [[maybe_unused]] int64_t n) {
  TFQC_ASSERT(e.act != GEGLU || n % PANEL == 0);
  TFQC_ASSERT(e.out != nullptr && e.out_ld >= (e.act == GEGLU ? n / 2 : n));
  TFQC_ASSERT(e.residual == nullptr || e.residual_ld >= (e.act == GEGLU ? n / 2 : n));
  TFQC_ASSERT(e.out_dtype != U8 || (e.quant.scale.base != nullptr && e.quant.zero.base != nullptr));
}

}  // namespace gemm

namespace {

using gemm::ceil_div;

// How outputs and their patch lie. Channels are those of one group.
struct Shape {
  int64_t channels, n, pitch, width, steps;
  int64_t span;  // rows of the product from one row of the image to the next: outputs, and what is skipped
  int64_t most;  // image rows at once

  explicit Shape(const ConvArgs& a) {
    channels = a.c / a.groups;
    n = a.n / a.groups;
    // With few channels all taps of a row are multiplied as one run.
    const bool joined = channels < gemm::STEP;
    pitch = joined ? channels : gemm::pitch_of(channels);
    width = (a.out_w - 1) * a.stride + a.kw;
    steps = joined ? a.kh * ceil_div(a.kw * channels, gemm::STEP) : a.kh * a.kw * ceil_div(channels, gemm::STEP);
    span = gemm::round_up(a.out_w, gemm::TILE);
    if (a.stride == 1 && width < span) span = width;  // tiles that run on into the next row
    most = 1;
    while (patch_bytes(a, most + 1) <= gemm::BLOCK_BYTES && (most + 1) * span <= gemm::MOST_ROWS) ++most;
  }

  // Of `rows` rows of outputs, which may belong to as many images.
  int64_t patch_bytes(const ConvArgs& a, int64_t rows) const {
    const int64_t images = std::min(a.batch, ceil_div(rows - 1, a.out_h) + 1);
    return ((rows - images) * a.stride + images * a.kh) * width * pitch + images * overrun(a);
  }
  // What the last tile of an image may read beyond its patch.
  int64_t overrun(const ConvArgs& a) const {
    return gemm::round_up(gemm::TILE * a.stride * pitch, gemm::STEP) + gemm::STEP;
  }
  int64_t product_rows() const { return gemm::round_up(most * span, gemm::TILE) + most * gemm::TILE; }
};

void list_steps(int64_t* steps, const ConvArgs& a, const Shape& shape) {
  const bool joined = shape.channels < gemm::STEP;
  const int64_t runs = joined ? 1 : a.kw, run = joined ? a.kw * shape.channels : shape.channels;
  for (int64_t y = 0; y < a.kh; ++y) {
    for (int64_t x = 0; x < runs; ++x) {
      for (int64_t i = 0; i < run; i += gemm::STEP) *steps++ = (y * shape.width + x) * shape.pitch + i;
    }
  }
}

// The patch of `rows` rows of outputs from row y of entry b; returns its end.
uint8_t* copy_patch(uint8_t* out, const ConvArgs& a, const Shape& shape, int64_t group, int64_t b, int64_t y,
                    int64_t rows, uint8_t zero) {
  const int64_t top = y * a.stride - a.pad, height = (rows - 1) * a.stride + a.kh;
  const int64_t begin = std::min(a.pad, shape.width), end = std::max(begin, std::min(shape.width, a.pad + a.w));
  const int64_t line = shape.width * shape.pitch;
  for (int64_t i = top; i < top + height; ++i, out += line) {
    if (i < 0 || i >= a.h) {
      std::memset(out, zero, size_t(line));
      continue;
    }
    const uint8_t* x = a.x + (b * a.h + i) * a.w * a.c + group * shape.channels;
    std::memset(out, zero, size_t(begin * shape.pitch));
    std::memset(out + end * shape.pitch, zero, size_t((shape.width - end) * shape.pitch));
    if (shape.pitch == a.c && a.groups == 1) {
      std::memcpy(out + begin * a.c, x, size_t((end - begin) * a.c));
    } else {
      for (int64_t j = begin; j < end; ++j) {
        std::memcpy(out + j * shape.pitch, x + (j - begin) * a.c, size_t(shape.channels));
      }
    }
  }
  return out + shape.overrun(a);
}

}  // namespace

extern "C" void tfqc_conv(const void* args, const Team& team) {
  const auto& a = *(const ConvArgs*)args;
  TFQC_ASSERT(a.batch > 0 && a.groups > 0 && a.c % a.groups == 0 && a.n % a.groups == 0 && a.stride > 0 && a.pad >= 0);
  TFQC_ASSERT(a.out_h > 0 && (a.out_h - 1) * a.stride + a.kh <= a.h + 2 * a.pad);
  TFQC_ASSERT(a.out_w > 0 && (a.out_w - 1) * a.stride + a.kw <= a.w + 2 * a.pad);
  gemm::check(a.epilogue, a.n);
  const Shape shape(a);
  const int64_t panels = ceil_div(shape.n, gemm::PANEL), columns = gemm::round_up(shape.n, gemm::TILE);
  const gemm::Part part = gemm::part_of(team, a.batch * a.out_h, shape.span, shape.most * shape.span, panels);
  if (part.row_begin == part.row_end || part.panel_begin == part.panel_end) return;

  Scratch scratch(team);
  auto* steps = scratch.take<int64_t>(shape.steps);
  auto* tiles = scratch.take<int64_t>(shape.product_rows() / gemm::TILE);
  auto* rows = scratch.take<gemm::Row>(shape.product_rows());
  auto* sums = scratch.take<int32_t>((shape.product_rows() + gemm::TILE) * gemm::PANEL);
  auto* codes = scratch.take<uint8_t>(shape.patch_bytes(a, shape.most));
  list_steps(steps, a, shape);

  const gemm::Tiles registers;
  const int64_t blocks = ceil_div(part.row_end - part.row_begin, shape.most);
  const int64_t size = ceil_div(part.row_end - part.row_begin, blocks);
  for (int64_t group = 0; group < a.groups; ++group) {
    const gemm::Weights weights{a.weight + group * columns * shape.steps * gemm::STEP,
                                a.weight_scale + group * columns, a.weight_sum + group * columns, shape.n, shape.steps,
                                group * shape.n, &a.epilogue};
    for (int64_t from = part.row_begin; from < part.row_end; from += size) {
      const int64_t to = std::min(part.row_end, from + size);
      gemm::Block block{codes, shape.patch_bytes(a, shape.most), shape.pitch * a.stride, 0, tiles, steps, rows};
      uint8_t* patch = codes;
      for (int64_t i = from; i < to;) {
        const int64_t b = i / a.out_h, y = i - b * a.out_h, stop = std::min(to, (b + 1) * a.out_h), height = stop - i;
        const int64_t length = gemm::round_up((height - 1) * shape.span + a.out_w, gemm::TILE);
        gemm::Row* image = rows + block.tile_count * gemm::TILE;
        for (int64_t r = 0; r < length; ++r) image[r].at = -1;
        for (int64_t r = 0; r < height; ++r) {
          const int64_t s = (y + r) * a.out_w;
          gemm::describe(image + r * shape.span, a.out_w, a.quant, a.epilogue, team.rows, b, s,
                         b * a.out_h * a.out_w + s);
        }
        for (int64_t r = 0; r < length; r += gemm::TILE) {
          const int64_t pixel = (r / shape.span * shape.width + r % shape.span) * a.stride;
          tiles[block.tile_count++] = patch - codes + pixel * shape.pitch;
        }
        patch = copy_patch(patch, a, shape, group, b, y, height, uint8_t(*a.quant.zero.at(team.rows, b)));
        i = stop;
      }
      gemm::multiply_block(weights, block, part.panel_begin, part.panel_end, sums);
    }
  }
}
// Linear layers: each thread copies its rows to where they lie well for the cache, and multiplies them.

namespace {

// Rows copied at once. Those of one thread are split evenly.
int64_t rows_at_once(int64_t pitch) {
  const int64_t fit = gemm::BLOCK_BYTES / pitch / gemm::STRIP * gemm::STRIP;
  return std::min(std::max(fit, gemm::STRIP), gemm::MOST_ROWS);
}

void describe_rows(gemm::Row* out, int64_t begin, int64_t end, const LinearArgs& a, const int64_t* rows) {
  for (int64_t m = begin; m < end;) {
    const int64_t b = m / a.seq, stop = std::min(end, (b + 1) * a.seq);
    gemm::describe(out + m - begin, stop - m, a.quant, a.epilogue, rows, b, m - b * a.seq, m);
    m = stop;
  }
  const int64_t all = gemm::round_up(end - begin, gemm::TILE);
  for (int64_t i = end - begin; i < all; ++i) out[i].at = -1;
}

}  // namespace

extern "C" void tfqc_linear(const void* args, const Team& team) {
  const auto& a = *(const LinearArgs*)args;
  TFQC_ASSERT(a.batch > 0 && a.seq > 0 && a.k > 0 && a.n > 0 && a.ldx >= a.k);
  gemm::check(a.epilogue, a.n);
  const int64_t m = a.batch * a.seq, pitch = gemm::pitch_of(a.k), most = rows_at_once(pitch);
  const gemm::Weights weights{a.weight, a.weight_scale, a.weight_sum, a.n, gemm::ceil_div(a.k, gemm::STEP), 0,
                              &a.epilogue};
  const gemm::Part part = gemm::part_of(team, gemm::ceil_div(m, gemm::STRIP), gemm::STRIP, most,
                                        gemm::ceil_div(a.n, gemm::PANEL));
  const int64_t begin = part.row_begin * gemm::STRIP, end = std::min(m, part.row_end * gemm::STRIP);
  if (begin >= end || part.panel_begin == part.panel_end) return;

  Scratch scratch(team);
  auto* steps = scratch.take<int64_t>(weights.steps);
  auto* tiles = scratch.take<int64_t>(most / gemm::TILE);
  auto* rows = scratch.take<gemm::Row>(most);
  auto* sums = scratch.take<int32_t>(most * gemm::PANEL);
  auto* codes = scratch.take<uint8_t>(most * pitch);
  for (int64_t i = 0; i < weights.steps; ++i) steps[i] = i * gemm::STEP;
  for (int64_t t = 0; t < most / gemm::TILE; ++t) tiles[t] = t * gemm::TILE * pitch;

  const gemm::Tiles registers;
  const int64_t blocks = gemm::ceil_div(end - begin, most);
  const int64_t size = gemm::round_up(gemm::ceil_div(end - begin, blocks), gemm::STRIP);
  for (int64_t from = begin; from < end; from += size) {
    const int64_t to = std::min(end, from + size);
    for (int64_t i = from; i < to; ++i) std::memcpy(codes + (i - from) * pitch, a.x + i * a.ldx, size_t(a.k));
    describe_rows(rows, from, to, a, team.rows);
    const gemm::Block block{codes, most * pitch, pitch, gemm::ceil_div(to - from, gemm::TILE), tiles, steps, rows};
    gemm::multiply_block(weights, block, part.panel_begin, part.panel_end, sums);
  }
}
// Element by element: activation, sum, and codes with a scale known before or found in each token.

#include <algorithm>
#include <cfloat>
#include <cmath>

// Codes as tfqc.quantize has them, bit for bit. An infinity gives the end of the range, a NaN gives 0.
extern "C" void tfqc_map(const void* args, const Team& team) {
  const MapArgs& map = *static_cast<const MapArgs*>(args);
  TFQC_ASSERT(map.ldx >= (map.act == GEGLU ? 2 * map.c : map.c));
  TFQC_ASSERT(map.out_dtype != U8 || map.quant.scale.base != nullptr);
  with_act(map.act, [&](auto act) {
    const Share share(team, map.batch * map.seq);
    for (int64_t token = share.begin; token < share.end; ++token) {
      const Codes codes(map.quant, team.rows, token / map.seq, token % map.seq);
      const int64_t from = token * map.ldx, to = token * map.c;
      each_vector(map.c, [&](int64_t i, int64_t n) {
        const V x = load_as(map.x, map.x_dtype, from + i, n);
        const V y = act == GEGLU ? x * gelu(load_as(map.x, map.x_dtype, from + map.c + i, n)) : activate(x, act);
        store_as(map.out, map.out_dtype, to + i, y, codes.inverse, codes.zero, n);
      });
    }
  });
}

// The scale of a token with a NaN or an infinity is NaN, so that all that is made of it is; its codes are 0.
extern "C" void tfqc_quantize_tokens(const void* args, const Team& team) {
  const TokenQuantizeArgs& tokens = *static_cast<const TokenQuantizeArgs*>(args);
  const Share share(team, tokens.tokens);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const int64_t at = token * tokens.c;
    V least = set(0), most = set(0), odd = set(0);  // odd: not 0 where a value is not finite
    each_vector(tokens.c, [&](int64_t i, int64_t n) {
      const V x = load_as(tokens.x, tokens.x_dtype, at + i, n);
      least = min(x, least);
      most = max(x, most);
      odd = fma(x, set(0), odd);
    });
    const float low = lowest(least), range = highest(most) - low + sum(odd);
    const float scale = std::isnan(range) ? range : std::max(range / 255, FLT_EPSILON);
    const float zero = std::isnan(range) ? 0 : std::nearbyint(-low / scale);
    tokens.scale[token] = scale;
    tokens.zero[token] = int32_t(zero);
    each_vector(tokens.c, [&](int64_t i, int64_t n) {
      store_codes(tokens.out + at + i, load_as(tokens.x, tokens.x_dtype, at + i, n) * set(1 / scale), set(zero), n);
    });
  }
}

extern "C" void tfqc_add(const void* args, const Team& team) {
  const AddArgs& add = *static_cast<const AddArgs*>(args);
  const Share share(team, add.batch * add.seq);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const int64_t b = token / add.seq, s = token % add.seq;
    const int64_t from_a = b * add.a_entry + s * add.c, from_b = b * add.b_entry + s * add.c, to = token * add.c;
    const float* gate = add.gate.base ? add.gate.at(team.rows, b, s) : nullptr;
    const Codes codes(add.quant, team.rows, b, s);
    each_vector(add.c, [&](int64_t i, int64_t n) {
      const V y = fma(load_as(add.a, add.a_dtype, from_a + i, n), gate ? load(gate + i, n) : set(1),
                      add.b ? load_as(add.b, add.b_dtype, from_b + i, n) : set(0));
      store_as(add.out, add.out_dtype, to + i, y, codes.inverse, codes.zero, n);
    });
  }
}
// Group norm and layer norm, then the activation, then codes.

#include <algorithm>
#include <cmath>

namespace {

// Sums are kept in double: squares of floats are exact there, and the variance survives a mean of 10^5 deviations.
struct Moments {
  double sum, square;
  // 1 / standard deviation of n values, whose mean is sum / n.
  double inverse_deviation(double n, double eps) const {
    const double mean = sum / n;
    return 1 / std::sqrt(std::max(square / n - mean * mean, 0.0) + eps);
  }
};

int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <typename Sum> Sum as(V x) {
  if constexpr (std::is_same_v<Sum, D>) {
    return widen(x);
  } else {
    return x;
  }
}
D widen(D x) { return x; }

// Adds tokens [begin, end) to the sums of their channels.
template <int32_t dtype>
void add_tokens(const NormArgs& norm, int64_t begin, int64_t end, double* sums, double* squares) {
  constexpr int64_t AT_ONCE = 8;  // sums are then read and written once for 8 tokens
  // Squares of bf16 have 16 bits: 8 of them near each other add up in f32 without rounding.
  using Sum = std::conditional_t<dtype == BF16, V, D>;
  for (int64_t t = begin; t < end; t += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, end - t);
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      Sum total{}, square{};
      for (int64_t k = 0; k < count; ++k) {
        const Sum x = as<Sum>(load_as(norm.x, dtype, (t + k) * norm.c + i, n));
        total = total + x;
        square = fma(x, x, square);
      }
      store(sums + i, load(sums + i) + widen(total));
      store(squares + i, load(squares + i) + widen(square));
    });
  }
}

// out = act((x * rstd + shift) * weight + bias) for one token.
void write_token(const NormArgs& norm, int64_t token, V rstd, V shift, const float* weight, const float* bias,
                 const Codes& codes) {
  const int64_t at = token * norm.c;
  with_act(norm.act, [&](auto act) {
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      const V x = fma(load_as(norm.x, norm.x_dtype, at + i, n), rstd, shift);
      const V y = fma(x, weight ? load(weight + i, n) : set(1), bias ? load(bias + i, n) : set(0));
      store_as(norm.out, norm.out_dtype, at + i, activate(y, act), codes.inverse, codes.zero, n);
    });
  });
}

void group_norm(const NormArgs& norm, const Team& team) {
  const int64_t slots = whole_vectors(norm.c), size = norm.c / norm.groups;
  TFQC_ASSERT(norm.c % norm.groups == 0);
  TFQC_ASSERT(team.shared_size >= 2 * team.count * norm.groups * int64_t(sizeof(Moments)));
  Scratch scratch(team);
  double* sums = scratch.take<double>(2 * slots);
  double* squares = sums + slots;
  float* slope = scratch.take<float>(2 * slots);
  float* offset = slope + slots;
  const Share share(team, norm.seq);

  for (int64_t b = 0; b < norm.batch; ++b) {
    std::fill(sums, squares + slots, 0.0);
    const int64_t begin = b * norm.seq + share.begin, end = b * norm.seq + share.end;
    const auto add = norm.x_dtype == F32 ? add_tokens<F32> : add_tokens<BF16>;
    add(norm, begin, end, sums, squares);

    // Entries take turns with two places, so one barrier an entry is enough: who writes to a place again has passed
    // the barrier of the entry between, and so has everybody who read it.
    Moments* of_team = reinterpret_cast<Moments*>(team.shared) + b % 2 * team.count * norm.groups;
    for (int64_t g = 0; g < norm.groups; ++g) {
      Moments mine{0, 0};
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        mine.sum += sums[c];
        mine.square += squares[c];
      }
      of_team[team.id * norm.groups + g] = mine;
    }
    team.barrier();

    const float* weight = norm.weight.base ? norm.weight.at(team.rows, b) : nullptr;
    const float* bias = norm.bias.base ? norm.bias.at(team.rows, b) : nullptr;
    const double n = double(norm.seq) * double(size);
    for (int64_t g = 0; g < norm.groups; ++g) {
      Moments all{0, 0};
      for (int32_t id = 0; id < team.count; ++id) {
        all.sum += of_team[id * norm.groups + g].sum;
        all.square += of_team[id * norm.groups + g].square;
      }
      const double rstd = all.inverse_deviation(n, norm.eps), mean = all.sum / n;
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        slope[c] = float(weight ? rstd * weight[c] : rstd);
        offset[c] = float((bias ? bias[c] : 0) - mean * slope[c]);
      }
    }

    for (int64_t token = begin; token < end; ++token) {
      write_token(norm, token, set(1), set(0), slope, offset, Codes(norm.quant, team.rows, b, token - b * norm.seq));
    }
  }
}

void layer_norm(const NormArgs& norm, const Team& team) {
  const Share share(team, norm.batch * norm.seq);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const int64_t b = token / norm.seq, s = token % norm.seq;
    D total = widen(set(0)), square = total;
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      const D x = widen(load_as(norm.x, norm.x_dtype, token * norm.c + i, n));
      total = total + x;
      square = fma(x, x, square);
    });
    const Moments moments{sum(total), sum(square)};
    const double rstd = moments.inverse_deviation(double(norm.c), norm.eps);
    const double shift = -moments.sum / double(norm.c) * rstd;
    const float* weight = norm.weight.base ? norm.weight.at(team.rows, b, s) : nullptr;
    const float* bias = norm.bias.base ? norm.bias.at(team.rows, b, s) : nullptr;
    write_token(norm, token, set(float(rstd)), set(float(shift)), weight, bias, Codes(norm.quant, team.rows, b, s));
  }
}

}  // namespace

// Group norm needs 24 bytes of scratch for each channel (rounded up to 16), and of the team's memory 32 bytes
// for each group and thread; layer norm needs none.
extern "C" void tfqc_norm(const void* args, const Team& team) {
  const NormArgs& norm = *static_cast<const NormArgs*>(args);
  if (norm.groups) {
    group_norm(norm, team);
  } else {
    layer_norm(norm, team);
  }
}
