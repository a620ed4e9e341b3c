// What the schedule hands to a kernel. `tfqc/backends/cpu_int8/abi.py` mirrors these structs field by field.
//
// Values lie in memory as [batch, seq, channels], channels last: an image is seq = height * width. Every kernel is run
// by all threads of a team at once and does its own share; the caller puts a barrier behind each.
#pragma once
#include <cstddef>
#include <cstdint>

#include "check.h"

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
