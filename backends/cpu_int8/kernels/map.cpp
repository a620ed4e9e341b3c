// Element by element: activation, sum, and codes with a scale known before or found in each token.
#include "vec.h"

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
