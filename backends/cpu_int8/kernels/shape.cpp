// Values that only change their place.
#include "vec.h"

namespace {

void convert(const void* from, int32_t from_dtype, int64_t begin, void* to, int32_t to_dtype, int64_t place,
             int64_t count) {
  if (from_dtype == to_dtype) {
    const size_t size = bytes_of(to_dtype);
    std::memcpy(static_cast<uint8_t*>(to) + place * size, static_cast<const uint8_t*>(from) + begin * size,
                count * size);
    return;
  }
  each_vector(count, [&](int64_t i, int64_t n) {
    store_as(to, to_dtype, place + i, load_as(from, from_dtype, begin + i, n), set(1), set(0), n);
  });
}

}  // namespace

extern "C" void tfqc_concat(const void* args, const Team& team) {
  const ConcatArgs& concat = *static_cast<const ConcatArgs*>(args);
  const int64_t width = concat.c + concat.c2;
  const Share share(team, concat.tokens);
  for (int64_t t = share.begin; t < share.end; ++t) {
    convert(concat.a, concat.a_dtype, t * concat.c, concat.out, concat.out_dtype, t * width, concat.c);
    convert(concat.b, concat.b_dtype, t * concat.c2, concat.out, concat.out_dtype, t * width + concat.c, concat.c2);
  }
}

extern "C" void tfqc_upsample(const void* args, const Team& team) {
  const UpsampleArgs& up = *static_cast<const UpsampleArgs*>(args);
  const int64_t line = up.w * up.pixel_bytes, wide_line = line * up.factor;
  const Share share(team, up.batch * up.h);
  for (int64_t y = share.begin; y < share.end; ++y) {
    const uint8_t* from = static_cast<const uint8_t*>(up.x) + y * line;
    uint8_t* const first = static_cast<uint8_t*>(up.out) + y * up.factor * wide_line;
    uint8_t* to = first;
    for (int64_t x = 0; x < up.w; ++x, from += up.pixel_bytes)
      for (int64_t copy = 0; copy < up.factor; ++copy, to += up.pixel_bytes) std::memcpy(to, from, up.pixel_bytes);
    for (int64_t copy = 1; copy < up.factor; ++copy, to += wide_line) std::memcpy(to, first, wide_line);
  }
}
