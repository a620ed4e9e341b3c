// Linear layers: each thread copies its rows to where they lie well for the cache, and multiplies them.
#include "abi.h"
#include "gemm.h"

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
