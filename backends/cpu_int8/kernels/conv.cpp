// Convolutions: each thread copies some rows of the image with their surroundings, padded by the zero point. In that
// patch the inputs of neighbouring outputs lie at the same distance for every tap, so its pixels are multiplied where
// they are.
#include "abi.h"
#include "gemm.h"

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
