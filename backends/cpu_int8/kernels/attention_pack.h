// How attention lays out what it reads: queries side by side in the lanes, keys and values as the words of products.
#pragma once
#include "attention_products.h"

#include <algorithm>
#include <cmath>

namespace attention {

// r[i] lane j <-> r[j] lane i.
inline void transpose(V (&r)[LANES]) {
#ifdef __AVX512F__
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    alignas(64) int32_t low[LANES], high[LANES];
    for (int lane = 0; lane < LANES; ++lane) {
      low[lane] = lane & step ? LANES + lane - step : lane;
      high[lane] = lane & step ? LANES + lane : lane + step;
    }
    const __m512i take_low = _mm512_load_si512(low), take_high = _mm512_load_si512(high);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & step) continue;
      const __m512 a = r[i].x, b = r[i + step].x;
      r[i].x = _mm512_permutex2var_ps(a, take_low, b);
      r[i + step].x = _mm512_permutex2var_ps(a, take_high, b);
    }
  }
#else
  float rows[LANES][LANES], columns[LANES][LANES];
  for (int i = 0; i < LANES; ++i) store(rows[i], r[i]);
  for (int i = 0; i < LANES; ++i) {
    for (int j = 0; j < LANES; ++j) columns[j][i] = rows[i][j];
  }
  for (int i = 0; i < LANES; ++i) r[i] = load(columns[i]);
#endif
}

#ifdef __AVX512BF16__
// Lane by lane a word of two bf16.
inline __m512i pairs(V even, V odd) {
  const __m512i low = _mm512_cvtepu16_epi32(to_bf16(even)), high = _mm512_cvtepu16_epi32(to_bf16(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

inline int64_t within(int64_t n) { return n < 0 ? 0 : n < LANES ? n : LANES; }

// A [tokens][d] view of one head.
struct Head {
  const void* base;
  int32_t dtype;
  int64_t first, token;
  V at(int64_t t, int64_t i, int64_t n) const {
    const int64_t from = first + t * token + i;
    return n == LANES ? load_as(base, dtype, from) : load_as(base, dtype, from, n);  // without a mask it is cheaper
  }
};

// Places and sizes, in words, for a body that takes its scores with Score and its outputs with Value.
template <class Score, class Value> struct Layout {
  int64_t d;
  int64_t units() const {  // words of a query or key
    const int64_t n = (d + Score::PACK - 1) / Score::PACK;
    return Score::TILES ? round_up(n, TILE) : n;
  }
  int64_t rows() const { return Score::TILES ? round_up(d, TILE) : d; }  // of the output, one for each channel
  int64_t padded(int64_t keys) const { return round_up(keys, Value::TILES ? 2 * TILE : Value::PACK); }
  int64_t key(int64_t t, int64_t unit) const {
    if (!Score::TILES) return t * units() + unit;
    return (t / TILE * (units() / TILE) + unit / TILE) * TILE * TILE + t % TILE * TILE + unit % TILE;
  }
  int64_t value(int64_t t, int64_t channel) const {
    if (!Value::TILES) return t / Value::PACK * rows() + channel;
    const int64_t pair = t / 2;
    return (pair / TILE * (rows() / TILE) + channel / TILE) * TILE * TILE + channel % TILE * TILE + pair % TILE;
  }
  // Distances of `product`: between rows and words of a, or between its tiles.
  int64_t key_row() const { return Score::TILES ? units() * TILE : units(); }
  int64_t key_step() const { return Score::TILES ? TILE * TILE : 1; }
  int64_t value_row() const { return Value::TILES ? TILE * TILE : 1; }
  int64_t value_step() const { return Value::TILES ? rows() * TILE : rows(); }
};

// Packed keys [first, first + count) of a head, and the length of the longest.
struct Span {
  Word *key, *value;
  float *scale, *mean;
  float longest;
};

inline void find_mean(const Head& k, int64_t keys, int64_t d, float* mean) {
  for (int64_t i = 0; i < d; i += LANES) {
    V sum = set(0);
    for (int64_t t = 0; t < keys; ++t) sum = sum + k.at(t, i, within(d - i));
    store(mean + i, sum * set(1 / float(keys)));
  }
}

template <class Score, class Value>
void pack_keys(const Layout<Score, Value>& layout, const Head& k, int64_t first, int64_t count, Span& span) {
  const int64_t d = layout.d, channels = layout.units() * Score::PACK;
  float longest = 0;
  for (int64_t t = 0; t < layout.padded(count); ++t) {
    const auto centred = [&](int64_t i) {
      if (t >= count) return set(0);
      return k.at(first + t, i, within(d - i)) - load(span.mean + i);
    };
    const auto place = [&](int64_t i) { return span.key + layout.key(t, i / Score::PACK); };
    V squares = set(0), most = set(0);
    for (int64_t i = 0; i < channels; i += LANES) {
      const V x = centred(i);
      squares = fma(x, x, squares);
      if (Score::PACK == 1) store((float*)place(i), x, within(channels - i));
      if (Score::PACK == 2) store_bf16((uint16_t*)place(i), x, within(channels - i));
      if (Score::PACK == 4) most = max(abs(x), most);
    }
    const float length = sum(squares);
    longest = longest != longest || longest > length ? longest : length;  // a NaN stays
    if (Score::PACK == 4) {
      span.scale[t] = std::max(highest(most), 1e-30f) / 127;
      for (int64_t i = 0; i < channels; i += LANES) {
        store_codes((uint8_t*)place(i), centred(i) * set(1 / span.scale[t]), set(128), within(channels - i));
      }
    }
  }
  span.longest = std::sqrt(longest);
}

template <class Score, class Value>
void pack_values(const Layout<Score, Value>& layout, const Head& v, int64_t first, int64_t count, Span& span) {
  const int64_t d = layout.d;
  const auto at = [&](int64_t t, int64_t i) { return t < count ? v.at(first + t, i, within(d - i)) : set(0); };
  if constexpr (Value::PACK == 1) {
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < d; i += LANES) store((float*)span.value + layout.value(t, i), at(t, i), within(d - i));
    }
#ifdef __AVX512BF16__
  } else if constexpr (!Value::TILES) {
    for (int64_t t = 0; t < count; t += 2) {
      for (int64_t i = 0; i < d; i += LANES) {
        _mm512_mask_storeu_epi32(span.value + layout.value(t, i), lanes(d - i), pairs(at(t, i), at(t + 1, i)));
      }
    }
  } else {
    for (int64_t t = 0; t < layout.padded(count); t += 2 * TILE) {
      for (int64_t i = 0; i < layout.rows(); i += TILE) {
        V tile[TILE];
#pragma GCC unroll 16
        for (int j = 0; j < TILE; ++j) tile[j].x = _mm512_castsi512_ps(pairs(at(t + 2 * j, i), at(t + 2 * j + 1, i)));
        transpose(tile);
#pragma GCC unroll 16
        for (int j = 0; j < TILE; ++j) store((float*)span.value + layout.value(t, i + j), tile[j]);
      }
    }
#endif
  }
}

// What is known of 32 queries: their words, and the output so far [rows][32] with its running maximum and sum.
struct Block {
  Word* query;
  float *out, *sum, *shift, *scale;
  int32_t* start;
  float longest;
};

// The queries [first, first + count), times `factor`; their sums start at 0. room: f32 [channels][32], for codes.
template <class Score, class Value>
void pack_queries(const Layout<Score, Value>& layout, const Head& q, int64_t first, int64_t count, float factor,
                  float* room, Block& block) {
  const int64_t d = layout.d, units = layout.units(), channels = units * Score::PACK;
  V longest = set(0);
  for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
    const auto at = [&](int64_t j, int64_t i) {
      return lane + j < count && i < d ? q.at(first + lane + j, i, within(d - i)) * set(factor) : set(0);
    };
    V rows[LANES], squares = set(0);
#ifdef __AVX512BF16__
    if constexpr (Score::PACK == 2) {
      for (int64_t unit = 0; unit < units; unit += LANES) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) {
          const V low = at(j, 2 * unit), high = at(j, 2 * unit + LANES);
          rows[j].x = _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high.x, low.x));
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) {
          const auto words = (__m512bh)_mm512_castps_si512(rows[j].x);
          squares.x = _mm512_dpbf16_ps(squares.x, words, words);
          if (unit + j < units) store((float*)block.query + (unit + j) * BLOCK + lane, rows[j]);
        }
      }
    }
#endif
    if constexpr (Score::PACK != 2) {
      V most = set(0);
      float* to = Score::PACK == 1 ? (float*)block.query : room;
      for (int64_t i = 0; i < channels; i += LANES) {
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) rows[j] = at(j, i);
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) {
          squares = fma(rows[j], rows[j], squares);
          most = max(abs(rows[j]), most);
          if (i + j < channels) store(to + (i + j) * BLOCK + lane, rows[j]);
        }
      }
#ifdef __AVX512VNNI__
      if constexpr (Score::PACK == 4) {
        const V scale = max(most, set(1e-30f)) * set(1 / 127.0f), inverse = set(1) / scale;
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = 0; i < units; ++i) {
          __m512i word = _mm512_setzero_si512();
#pragma GCC unroll 4
          for (int64_t j = 0; j < 4; ++j) {
            const __m512i code = _mm512_cvtps_epi32((load(room + (4 * i + j) * BLOCK + lane) * inverse).x);
            total = _mm512_add_epi32(total, code);
            word = _mm512_or_si512(word, _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(255)), 8 * j));
          }
          _mm512_storeu_si512(block.query + i * BLOCK + lane, word);
        }
        store(block.scale + lane, scale);
        _mm512_storeu_si512(block.start + lane, _mm512_mullo_epi32(total, _mm512_set1_epi32(-128)));
      }
#endif
    }
    store(block.sum + lane, squares * set(0));  // a NaN stays, whatever becomes of scores
    longest = max(longest, squares);
  }
  block.longest = std::sqrt(highest(longest));
}

}  // namespace attention
