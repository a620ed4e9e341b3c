// The product of u8 codes and packed s8 weights, and what follows it, for one thread. Linear layers and convolutions
// differ only in where a tile of 16 rows lies in memory. Exact: no sum is ever rounded or saturated, and it becomes a
// float, to nearest even, when the zero point's part has been taken off.
#pragma once
#include "abi.h"
#include "vec.h"

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
