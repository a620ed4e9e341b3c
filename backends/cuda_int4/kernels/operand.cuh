// Where the codes of a product's left operand lie. A row is K codes; a chunk is 16 bytes of it, K / chunk codes apart.
// `row` is the byte offset of row m, `chunk` that of chunk q from its row.
#pragma once
#include "common.cuh"

// Rows [M, K]: linear layers, and convolutions of 1 x 1 over channels last.
template <int ROW_BYTES>
struct LinearRows {
  static __device__ __forceinline__ long long row(int m) { return (long long)m * ROW_BYTES; }
  static __device__ __forceinline__ int chunk(int q) { return q * 16; }
};

// A convolution of 3 x 3 as a product: row m is an output pixel (image, y, x), its K codes the window over an image
// [HEIGHT + 2, WIDTH + 2, channels] of codes with a border of zero points, so that no window leaves it. The three taps
// of a window's row follow each other in memory: only from row to row is there a gap.
template <int PIXEL_BYTES, int HEIGHT, int WIDTH, int STRIDE>
struct ConvRows {
  static constexpr int LINE_BYTES = (WIDTH + 2) * PIXEL_BYTES;
  static constexpr int OUT_HEIGHT = (HEIGHT - 1) / STRIDE + 1, OUT_WIDTH = (WIDTH - 1) / STRIDE + 1;
  static constexpr int TAP_CHUNKS = 3 * PIXEL_BYTES / 16;

  static __device__ __forceinline__ long long row(int m) {
    const int x = m % OUT_WIDTH, y = m / OUT_WIDTH % OUT_HEIGHT, image = m / (OUT_WIDTH * OUT_HEIGHT);
    return ((long long)image * (HEIGHT + 2) + y * STRIDE) * LINE_BYTES + x * STRIDE * PIXEL_BYTES;
  }
  static __device__ __forceinline__ int chunk(int q) {
    return q * 16 + q / TAP_CHUNKS * (LINE_BYTES - 3 * PIXEL_BYTES);
  }
};
