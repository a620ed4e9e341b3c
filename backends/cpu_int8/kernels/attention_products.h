// The products of attention: c[m][32] = a[m][k] b[k][32], where the 32 columns are queries side by side and one k is a
// word: a float, two bf16 or four codes.
#pragma once
#include "vec.h"

#ifdef __AMX_TILE__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attention {

using Word = uint32_t;

constexpr int64_t BLOCK = 2 * LANES;  // queries side by side
constexpr int64_t TILE = 16;          // rows of an AMX tile, and words in one of its rows

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How to undo the quantization of a product of codes: c = (sum + start[query]) * row_scale[m] * query_scale[query].
struct CodeScales {
  const int32_t* start;
  const float *row_scale, *query_scale;
};

struct FloatDot {
  static constexpr int64_t PACK = 1;  // values in a word
  static constexpr bool TILES = false;
  using Sum = V;
  using Words = V;
  static Words load_words(const Word* b) { return load((const float*)b); }
  static V more(V sum, Word a, Words b) {
    float f;
    std::memcpy(&f, &a, 4);
    return fma(set(f), b, sum);
  }
  static V begin(const CodeScales&, int64_t) { return set(0); }
  static V end(V sum, const CodeScales&, int64_t, int64_t) { return sum; }
};

#ifdef __AVX512BF16__
struct Bf16Dot : FloatDot {  // pairs of bf16, summed in f32
  static constexpr int64_t PACK = 2;
  using Words = __m512i;
  static Words load_words(const Word* b) { return _mm512_loadu_si512(b); }
  static V more(V sum, Word a, Words b) {
    return {_mm512_dpbf16_ps(sum.x, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b)};
  }
};
#endif

#ifdef __AVX512VNNI__
struct CodeDot {  // a is u8 with zero point 128, b is s8; `start` takes the zero point off
  static constexpr int64_t PACK = 4;
  static constexpr bool TILES = false;
  using Sum = VI;
  using Words = __m512i;
  static Words load_words(const Word* b) { return _mm512_loadu_si512(b); }
  static VI more(VI sum, Word a, Words b) { return {_mm512_dpbusd_epi32(sum.x, _mm512_set1_epi32(int(a)), b)}; }
  static VI begin(const CodeScales& scales, int64_t query) { return load_i32(scales.start + query); }
  static V end(VI sum, const CodeScales& scales, int64_t row, int64_t query) {
    return to_float(sum) * set(scales.row_scale[row]) * load(scales.query_scale + query);
  }
};
#endif

#ifdef __AMX_BF16__
struct TileDot : Bf16Dot {
  static constexpr bool TILES = true;
};

// Tiles of 16 rows of 64 bytes, on every thread that runs tile instructions.
struct TileSession {
  TileSession() {
    [[maybe_unused]] static const long asked = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18);
    struct alignas(64) Shape {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileSession() { _tile_release(); }
};

// In the products of tiles, a lies at [m tile][k tile][16][16] with the given distances between tiles, in words; m and
// k are multiples of 16. What they wait for is the front end: a tile load keeps it for 9 cycles, a store for 18 and,
// right behind the product that it stores, for 50; a product takes the tile unit for 16.
constexpr int64_t TILE_ROW = BLOCK * 4;

// K tiles of k, one or two: b stays in tiles 0 to 3, and a result is stored when the next one is on its way.
template <bool ADD, int K>
inline void short_tile_product(const Word* a, int64_t m_step, int64_t k_step, int64_t m, const Word* b, float* c) {
  asm volatile("" ::: "memory");  // gcc does not know that a tile load reads memory
  _tile_loadd(0, b, TILE_ROW);
  _tile_loadd(1, b + LANES, TILE_ROW);
  if (K == 2) {
    _tile_loadd(2, b + TILE * BLOCK, TILE_ROW);
    _tile_loadd(3, b + TILE * BLOCK + LANES, TILE_ROW);
  }
  float* waiting = nullptr;
  for (const float* end = c + m * BLOCK; c < end; c += TILE * BLOCK, a += m_step) {
    _tile_loadd(4, a, 64);
    if (K == 2) _tile_loadd(5, a + k_step, 64);
    if (ADD) {
      _tile_loadd(6, c, TILE_ROW);
    } else {
      _tile_zero(6);
    }
    _tile_dpbf16ps(6, 4, 0);
    if (K == 2) _tile_dpbf16ps(6, 5, 2);
    if (waiting != nullptr) _tile_stored(7, waiting, TILE_ROW);
    waiting = c + LANES;
    if (ADD) {
      _tile_loadd(7, waiting, TILE_ROW);
    } else {
      _tile_zero(7);
    }
    _tile_dpbf16ps(7, 4, 1);
    if (K == 2) _tile_dpbf16ps(7, 5, 3);
    _tile_stored(6, c, TILE_ROW);
  }
  _tile_stored(7, waiting, TILE_ROW);
}

// Any k: two by two results at a time.
template <bool ADD>
inline void long_tile_product(const Word* a, int64_t m_step, int64_t k_step, int64_t m, int64_t k, const Word* b,
                              float* c) {
  asm volatile("" ::: "memory");
  for (; m > 0; m -= 2 * TILE, a += 2 * m_step, c += 2 * TILE * BLOCK) {
    const bool both = m > TILE;  // else there is only one more row of tiles
    if (ADD) {
      _tile_loadd(0, c, TILE_ROW);
      _tile_loadd(1, c + LANES, TILE_ROW);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    if (ADD && both) {
      _tile_loadd(2, c + TILE * BLOCK, TILE_ROW);
      _tile_loadd(3, c + TILE * BLOCK + LANES, TILE_ROW);
    } else {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t i = 0; i < k / TILE; ++i) {
      _tile_loadd(4, a + i * k_step, 64);
      _tile_loadd(6, b + i * TILE * BLOCK, TILE_ROW);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b + i * TILE * BLOCK + LANES, TILE_ROW);
      _tile_dpbf16ps(1, 4, 7);
      if (!both) continue;
      _tile_loadd(5, a + m_step + i * k_step, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, TILE_ROW);
    _tile_stored(1, c + LANES, TILE_ROW);
    if (!both) continue;
    _tile_stored(2, c + TILE * BLOCK, TILE_ROW);
    _tile_stored(3, c + TILE * BLOCK + LANES, TILE_ROW);
  }
}

template <bool ADD>
inline void tile_product(const Word* a, int64_t m_step, int64_t k_step, int64_t m, int64_t k, const Word* b, float* c) {
  if (k == TILE) return short_tile_product<ADD, 1>(a, m_step, k_step, m, b, c);
  if (k == 2 * TILE) return short_tile_product<ADD, 2>(a, m_step, k_step, m, b, c);
  long_tile_product<ADD>(a, m_step, k_step, m, k, b, c);
}
#endif

// ROWS rows of c, in vector registers; a[m][k] lies at m * row + k * step.
template <class Dot, bool ADD, int ROWS, int VECTORS>
inline void rows_of_product(const Word* a, int64_t row, int64_t step, int64_t k, const Word* b, float* c,
                            const CodeScales& scales, int64_t m, int64_t query) {
  typename Dot::Sum sum[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      if constexpr (ADD) {
        sum[r][v] = load(c + (m + r) * BLOCK + query + v * LANES);
      } else {
        sum[r][v] = Dot::begin(scales, query + v * LANES);
      }
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    typename Dot::Words words[VECTORS];
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) words[v] = Dot::load_words(b + i * BLOCK + query + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = Dot::more(sum[r][v], a[(m + r) * row + i * step], words[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      const int64_t lane = query + v * LANES;
      if constexpr (ADD) {
        store(c + (m + r) * BLOCK + lane, sum[r][v]);
      } else {
        store(c + (m + r) * BLOCK + lane, Dot::end(sum[r][v], scales, m + r, lane));
      }
    }
  }
}

template <class Dot, bool ADD>
inline void product(const Word* a, int64_t row, int64_t step, int64_t m, int64_t k, const Word* b, float* c,
                    const CodeScales& scales = {}) {
#ifdef __AMX_BF16__
  if constexpr (Dot::TILES) return tile_product<ADD>(a, row, step, m, k, b, c);
#endif
#ifdef __AVX512F__
  constexpr int ROWS = 8, VECTORS = 2;
#else
  constexpr int ROWS = 6, VECTORS = 1;  // twelve sums in sixteen registers
#endif
  for (int64_t query = 0; query < BLOCK; query += VECTORS * LANES) {
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS) {
      rows_of_product<Dot, ADD, ROWS, VECTORS>(a, row, step, k, b, c, scales, i, query);
    }
    for (; i + ROWS / 2 <= m; i += ROWS / 2) {
      rows_of_product<Dot, ADD, ROWS / 2, VECTORS>(a, row, step, k, b, c, scales, i, query);
    }
    for (; i < m; ++i) rows_of_product<Dot, ADD, 1, VECTORS>(a, row, step, k, b, c, scales, i, query);
  }
}

}  // namespace attention
