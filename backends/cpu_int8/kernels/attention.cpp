// softmax(q k^T * scale + mask) v, for 32 queries at a time and never more scores than 64 keys have with them.
//
// Queries lie side by side in the lanes of vectors: scores are [key][32 queries] and outputs [channel][32 queries], so
// a maximum or a sum over keys is one instruction for 16 queries, and an output leaves by a transposition.
//
// Mode 1 asks for bf16 products and mode 2 for products of codes; where a CPU has no such instruction they run as
// products of floats, which are more exact. In both the mean of the keys is taken off first: it adds the same to all
// scores of a query. A row that the mask forbids altogether gives 0, as in torch; of entries of a mask that are not
// numbers nothing is said.
//
// Scratch: what the keys and values of one head need, or 2 MB, and then these pass in spans.
#include "attention_pack.h"

#include <cfloat>

namespace attention {

constexpr int64_t CHUNK = 64;  // keys whose scores exist at a time
constexpr int64_t GROUP = 16;  // blocks of queries that see a span before the next one is packed
constexpr float LOG2_E = 1.44269504f;
// Powers of 2 that are products and sums of a few thousand without overflow or loss: no maximum has to be known.
constexpr float BOUNDED = 100;

// 2^y for y < 128; 0 for -infinity, a NaN stays one.
inline V power(V y) {
#ifdef __AVX512F__
  constexpr float LOWEST = -300;
#else
  constexpr float LOWEST = -127;  // where scale_by_power_of_2 gives 0
#endif
  y = max(set(LOWEST), y);
  const V whole = round(y), f = y - whole;
  V p = fma(set(1.53458115e-4f), f, set(1.33999315e-3f));
  p = fma(p, f, set(9.61848896e-3f));
  p = fma(p, f, set(5.55032878e-2f));
  p = fma(p, f, set(2.40226469e-1f));
  p = fma(p, f, set(6.93147206e-1f));
  p = fma(p, f, set(1));
  return scale_by_power_of_2(p, whole);
}

#ifdef __AVX512BF16__
// Pairs of bf16 near 2^y for y within -127..100 (0 for -127), 32 at a time. Rounded to 1/256, y + 127 is a bf16 (and a
// bit) whose exponent is right and whose fraction f stands for 1 + f; 2^f is 1 + f - 0.344 f (1 - f), within 0.2%.
inline __m512i bounded_powers(V even, V odd) {
  const __m512 point = _mm512_set1_ps(49152 + 127);  // at 2^15 and above the last bit of a float is 1/256
  const __m512i low = _mm512_castps_si512(_mm512_add_ps(even.x, point));
  const __m512i high = _mm512_slli_epi32(_mm512_castps_si512(_mm512_add_ps(odd.x, point)), 16);
  const __m512i fixed = _mm512_mask_blend_epi16(0xaaaaaaaa, low, high);
  const __m512i f = _mm512_and_si512(fixed, _mm512_set1_epi16(255));
  const __m512i bow = _mm512_mullo_epi16(f, _mm512_sub_epi16(_mm512_set1_epi16(256), f));
  const __m512i curved = _mm512_sub_epi16(fixed, _mm512_mulhi_epu16(bow, _mm512_set1_epi16(88)));
  return _mm512_avg_epu16(curved, _mm512_setzero_si512());  // half of it, rounded
}
#endif

// Turns scores (as powers of 2) into probabilities up to a factor, and keeps sum and maximum of the block.
template <class Value, bool BOUND>
void weigh(float* scores, int64_t keys, int64_t padded, int64_t rows, Block& block, Word* weights) {
  for (int64_t t = keys; t < padded; ++t) {
    for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
      store(scores + t * BLOCK + lane, set(BOUND ? -127 : -INFINITY));
    }
  }
  const auto score = [&](int64_t t, int v) { return load(scores + t * BLOCK + v * LANES); };
  V total[2], shift[2] = {set(0), set(0)};
  for (int v = 0; v < 2; ++v) total[v] = load(block.sum + v * LANES);
  if (!BOUND) {
    V most[2][2];  // of even and of odd keys, as a maximum waits for the one before
    for (int v = 0; v < 2; ++v) most[0][v] = most[1][v] = load(block.shift + v * LANES);
    for (int64_t t = 0; t < keys; ++t) {
      for (int v = 0; v < 2; ++v) most[0][v] = max(score(t, v), most[0][v]);
      if (++t == keys) break;
      for (int v = 0; v < 2; ++v) most[1][v] = max(score(t, v), most[1][v]);
    }
    for (int v = 0; v < 2; ++v) {
      const V before = load(block.shift + v * LANES);
      shift[v] = max(most[0][v], most[1][v]);
      if (highest(shift[v] - before) <= 0) continue;
      const V factor = power(before - shift[v]);
      total[v] = total[v] * factor;
      store(block.shift + v * LANES, shift[v]);
      for (int64_t i = v * LANES; i < rows * BLOCK; i += BLOCK) store(block.out + i, load(block.out + i) * factor);
    }
  }
  if constexpr (Value::PACK == 1) {
    for (int64_t t = 0; t < keys; ++t) {
      for (int v = 0; v < 2; ++v) {
        const V p = power(score(t, v) - shift[v]);
        total[v] = total[v] + p;
        store((float*)weights + t * BLOCK + v * LANES, p);
      }
    }
#ifdef __AVX512BF16__
  } else {
    const __m512i ones = _mm512_set1_epi32(0x3f803f80);
    const auto exponent = [&](int64_t t, int v) {
      return BOUND ? score(t, v) : max(score(t, v) - shift[v], set(-127));
    };
    for (int64_t t = 0; t < padded; t += 2) {
      for (int v = 0; v < 2; ++v) {
        const __m512i p = bounded_powers(exponent(t, v), exponent(t + 1, v));
        total[v].x = _mm512_dpbf16_ps(total[v].x, (__m512bh)p, (__m512bh)ones);
        _mm512_storeu_si512(weights + t / 2 * BLOCK + v * LANES, p);
      }
    }
#endif
  }
  for (int v = 0; v < 2; ++v) store(block.sum + v * LANES, total[v]);
}

template <class Score, class Value> class Attention {
 public:
  Attention(const AttentionArgs& args, const Team& team) : args(args), team(team), layout{args.d} {}

  void run() {
    const int64_t blocks = (args.queries + BLOCK - 1) / BLOCK;
    const Share share(team, args.batch * args.heads * blocks);
    if (share.begin == share.end) return;
    plan();
    int64_t packed_item = -1, packed_first = -1;
    for (int64_t i = share.begin, end; i < share.end; i = end) {
      const int64_t item = i / blocks;
      end = std::min({share.end, (item + 1) * blocks, i + group});
      for (int64_t j = i; j < end; ++j) begin_block(item, (j % blocks) * BLOCK, block[j - i]);
      for (int64_t first = 0; first < args.keys; first += span_keys) {
        const int64_t count = std::min(span_keys, args.keys - first);
        if (item != packed_item || first != packed_first) {
          pack(item, first, count, item != packed_item);
          packed_item = item;
          packed_first = first;
        }
        for (int64_t j = i; j < end; ++j) attend(item, (j % blocks) * BLOCK, first, count, block[j - i]);
      }
      for (int64_t j = i; j < end; ++j) end_block(item, (j % blocks) * BLOCK, block[j - i]);
    }
  }

 private:
  void plan() {
    Scratch room(team);
    scores = room.take<float>(CHUNK * BLOCK);
    weights = Value::PACK == 1 ? (Word*)scores : room.take<Word>(CHUNK * BLOCK / 2);
    query_room = room.take<float>(layout.units() * Score::PACK * BLOCK);
    span.mean = room.take<float>(round_up(layout.units() * Score::PACK, LANES));
    const int64_t key_words = layout.units() + (layout.rows() + Value::PACK - 1) / Value::PACK + 1;
    const auto take_blocks = [&](int64_t n) {
      for (int64_t j = 0; j < n; ++j) {
        block[j].query = room.take<Word>(layout.units() * BLOCK);
        block[j].out = room.take<float>(round_up(layout.rows(), LANES) * BLOCK);
        block[j].sum = room.take<float>(BLOCK);
        block[j].shift = room.take<float>(BLOCK);
        block[j].scale = room.take<float>(BLOCK);
        block[j].start = room.take<int32_t>(BLOCK);
      }
      return (room.end - room.next - 256) / (key_words * 4) / CHUNK * CHUNK;
    };
    const Scratch before = room;
    group = 1;
    span_keys = take_blocks(group);
    if (span_keys < args.keys) {
      const int64_t block_bytes = room.next - before.next;  // as many blocks as leave a quarter of the room to keys
      group = std::clamp<int64_t>((room.end - before.next) * 3 / 4 / block_bytes, 1, GROUP);
      room = before;
      span_keys = take_blocks(group);
    } else {
      span_keys = round_up(args.keys, CHUNK);
    }
    TFQC_ASSERT(span_keys > 0);
    span.key = room.take<Word>(layout.units() * span_keys);
    span.value = room.take<Word>(layout.rows() * span_keys / Value::PACK);
    span.scale = room.take<float>(span_keys);
  }

  Head head(const void* base, int32_t dtype, int64_t item, int64_t entry, int64_t token, int64_t head) const {
    return {base, dtype, item / args.heads * entry + item % args.heads * head, token};
  }

  void pack(int64_t item, int64_t first, int64_t count, bool new_item) {
    const Head k = head(args.k, args.k_dtype, item, args.k_entry, args.k_token, args.k_head);
    const Head v = head(args.v, args.v_dtype, item, args.v_entry, args.v_token, args.v_head);
    if (new_item) {
      std::fill_n(span.mean, round_up(layout.units() * Score::PACK, LANES), 0.0f);
      if (args.mode != 0) find_mean(k, args.keys, args.d, span.mean);
    }
    pack_keys(layout, k, first, count, span);
    pack_values(layout, v, first, count, span);
  }

  void begin_block(int64_t item, int64_t query, Block& block) {
    const Head q = head(args.q, args.q_dtype, item, args.q_entry, args.q_token, args.q_head);
    const int64_t count = std::min(BLOCK, args.queries - query);
    pack_queries(layout, q, query, count, args.scale * LOG2_E, query_room, block);
    std::fill_n(block.out, round_up(layout.rows(), LANES) * BLOCK, 0.0f);
    std::fill_n(block.shift, BLOCK, -FLT_MAX);
  }

  void attend(int64_t item, int64_t query, int64_t first, int64_t count, Block& block) {
    const bool bound = args.mask == nullptr && args.keys <= span_keys && block.longest * span.longest < BOUNDED;
    if (std::isnan(span.longest)) std::fill_n(block.sum, BLOCK, span.longest);
    for (int64_t t = 0; t < count; t += CHUNK) {
      const int64_t keys = std::min(CHUNK, count - t), padded = layout.padded(keys);
      multiply_keys(t, padded, block);
      if (args.mask != nullptr) add_mask(item, query, first + t, keys);
      if (bound) {
        weigh<Value, true>(scores, keys, padded, layout.rows(), block, weights);
      } else {
        weigh<Value, false>(scores, keys, padded, layout.rows(), block, weights);
      }
      multiply_values(t, padded, block);
    }
  }

  void multiply_keys(int64_t t, int64_t padded, const Block& block) {
    product<Score, false>(span.key + layout.key(t, 0), layout.key_row(), layout.key_step(), padded, layout.units(),
                          block.query, scores, {block.start, span.scale + t, block.scale});
  }

  void multiply_values(int64_t t, int64_t padded, const Block& block) {
    product<Value, true>(span.value + layout.value(t, 0), layout.value_row(), layout.value_step(), layout.rows(),
                         padded / Value::PACK, weights, block.out);
  }

  void add_mask(int64_t item, int64_t query, int64_t first, int64_t keys) {
    const int64_t entry = item / args.heads * args.mask_entry + item % args.heads * args.mask_head;
    for (int64_t t = 0; t < keys; ++t) {
      const float* mask = args.mask + entry + (first + t) * args.mask_key + query * args.mask_query;
      float* score = scores + t * BLOCK;
      for (int64_t j = 0; j < std::min(BLOCK, args.queries - query); ++j) {
        score[j] += mask[j * args.mask_query] * LOG2_E;
      }
    }
  }

  void end_block(int64_t item, int64_t query, const Block& block) {
    const int64_t b = item / args.heads, h = item % args.heads;
    for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
      const int64_t count = std::min(LANES, args.queries - query - lane);
      const V inverse = set(1) / max(set(FLT_MIN), load(block.sum + lane));
      for (int64_t i = 0; i < args.d; i += LANES) {
        V rows[LANES];
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) rows[j] = load(block.out + (i + j) * BLOCK + lane) * inverse;
        transpose(rows);
        const int64_t n = within(args.d - i);
#pragma GCC unroll 16
        for (int64_t j = 0; j < LANES; ++j) {
          if (j >= count) break;
          const int64_t at = b * args.out_entry + h * args.out_head + (query + lane + j) * args.out_token + i;
          const Codes codes(args.quant, team.rows, b, query + lane + j);
          if (n == LANES) {
            store_as(args.out, args.out_dtype, at, rows[j], codes.inverse, codes.zero);
          } else {
            store_as(args.out, args.out_dtype, at, rows[j], codes.inverse, codes.zero, n);
          }
        }
      }
    }
  }

  const AttentionArgs& args;
  const Team& team;
  const Layout<Score, Value> layout;
  float *scores, *query_room;
  Word* weights;
  Span span;
  Block block[GROUP];
  int64_t group, span_keys;
};

template <class Score, class Value> void run(const AttentionArgs& args, const Team& team) {
  Attention<Score, Value>(args, team).run();
}

}  // namespace attention

extern "C" void tfqc_attention(const void* untyped, const Team& team) {
  using namespace attention;
  const AttentionArgs& args = *(const AttentionArgs*)untyped;
#if defined(__AMX_BF16__)
  // Mode 2 as mode 1: codes would save a quarter of the products' time and add half to that of the exponentials.
  if (args.mode != 0) {
    const TileSession session;
    return run<TileDot, TileDot>(args, team);
  }
#elif defined(__AVX512BF16__)
  if (args.mode == 1) return run<Bf16Dot, Bf16Dot>(args, team);
  if (args.mode == 2) return run<CodeDot, Bf16Dot>(args, team);
#elif defined(__AVX512VNNI__)
  if (args.mode == 2) return run<CodeDot, FloatDot>(args, team);
#endif
  run<FloatDot, FloatDot>(args, team);
}
