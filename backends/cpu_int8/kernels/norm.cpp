// Group norm and layer norm, then the activation, then codes.
#include "vec.h"

#include <algorithm>
#include <cmath>

namespace {

// Sums are kept in double: squares of floats are exact there, and the variance survives a mean of 10^5 deviations.
struct Moments {
  double sum, square;
  // 1 / standard deviation of n values, whose mean is sum / n.
  double inverse_deviation(double n, double eps) const {
    const double mean = sum / n;
    return 1 / std::sqrt(std::max(square / n - mean * mean, 0.0) + eps);
  }
};

int64_t whole_vectors(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <typename Sum> Sum as(V x) {
  if constexpr (std::is_same_v<Sum, D>) {
    return widen(x);
  } else {
    return x;
  }
}
D widen(D x) { return x; }

// Adds tokens [begin, end) to the sums of their channels.
template <int32_t dtype>
void add_tokens(const NormArgs& norm, int64_t begin, int64_t end, double* sums, double* squares) {
  constexpr int64_t AT_ONCE = 8;  // sums are then read and written once for 8 tokens
  // Squares of bf16 have 16 bits: 8 of them near each other add up in f32 without rounding.
  using Sum = std::conditional_t<dtype == BF16, V, D>;
  for (int64_t t = begin; t < end; t += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, end - t);
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      Sum total{}, square{};
      for (int64_t k = 0; k < count; ++k) {
        const Sum x = as<Sum>(load_as(norm.x, dtype, (t + k) * norm.c + i, n));
        total = total + x;
        square = fma(x, x, square);
      }
      store(sums + i, load(sums + i) + widen(total));
      store(squares + i, load(squares + i) + widen(square));
    });
  }
}

// out = act((x * rstd + shift) * weight + bias) for one token.
void write_token(const NormArgs& norm, int64_t token, V rstd, V shift, const float* weight, const float* bias,
                 const Codes& codes) {
  const int64_t at = token * norm.c;
  with_act(norm.act, [&](auto act) {
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      const V x = fma(load_as(norm.x, norm.x_dtype, at + i, n), rstd, shift);
      const V y = fma(x, weight ? load(weight + i, n) : set(1), bias ? load(bias + i, n) : set(0));
      store_as(norm.out, norm.out_dtype, at + i, activate(y, act), codes.inverse, codes.zero, n);
    });
  });
}

void group_norm(const NormArgs& norm, const Team& team) {
  const int64_t slots = whole_vectors(norm.c), size = norm.c / norm.groups;
  TFQC_ASSERT(norm.c % norm.groups == 0);
  TFQC_ASSERT(team.shared_size >= 2 * team.count * norm.groups * int64_t(sizeof(Moments)));
  Scratch scratch(team);
  double* sums = scratch.take<double>(2 * slots);
  double* squares = sums + slots;
  float* slope = scratch.take<float>(2 * slots);
  float* offset = slope + slots;
  const Share share(team, norm.seq);

  for (int64_t b = 0; b < norm.batch; ++b) {
    std::fill(sums, squares + slots, 0.0);
    const int64_t begin = b * norm.seq + share.begin, end = b * norm.seq + share.end;
    const auto add = norm.x_dtype == F32 ? add_tokens<F32> : add_tokens<BF16>;
    add(norm, begin, end, sums, squares);

    // Entries take turns with two places, so one barrier an entry is enough: who writes to a place again has passed
    // the barrier of the entry between, and so has everybody who read it.
    Moments* of_team = reinterpret_cast<Moments*>(team.shared) + b % 2 * team.count * norm.groups;
    for (int64_t g = 0; g < norm.groups; ++g) {
      Moments mine{0, 0};
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        mine.sum += sums[c];
        mine.square += squares[c];
      }
      of_team[team.id * norm.groups + g] = mine;
    }
    team.barrier();

    const float* weight = norm.weight.base ? norm.weight.at(team.rows, b) : nullptr;
    const float* bias = norm.bias.base ? norm.bias.at(team.rows, b) : nullptr;
    const double n = double(norm.seq) * double(size);
    for (int64_t g = 0; g < norm.groups; ++g) {
      Moments all{0, 0};
      for (int32_t id = 0; id < team.count; ++id) {
        all.sum += of_team[id * norm.groups + g].sum;
        all.square += of_team[id * norm.groups + g].square;
      }
      const double rstd = all.inverse_deviation(n, norm.eps), mean = all.sum / n;
      for (int64_t c = g * size; c < (g + 1) * size; ++c) {
        slope[c] = float(weight ? rstd * weight[c] : rstd);
        offset[c] = float((bias ? bias[c] : 0) - mean * slope[c]);
      }
    }

    for (int64_t token = begin; token < end; ++token) {
      write_token(norm, token, set(1), set(0), slope, offset, Codes(norm.quant, team.rows, b, token - b * norm.seq));
    }
  }
}

void layer_norm(const NormArgs& norm, const Team& team) {
  const Share share(team, norm.batch * norm.seq);
  for (int64_t token = share.begin; token < share.end; ++token) {
    const int64_t b = token / norm.seq, s = token % norm.seq;
    D total = widen(set(0)), square = total;
    each_vector(norm.c, [&](int64_t i, int64_t n) {
      const D x = widen(load_as(norm.x, norm.x_dtype, token * norm.c + i, n));
      total = total + x;
      square = fma(x, x, square);
    });
    const Moments moments{sum(total), sum(square)};
    const double rstd = moments.inverse_deviation(double(norm.c), norm.eps);
    const double shift = -moments.sum / double(norm.c) * rstd;
    const float* weight = norm.weight.base ? norm.weight.at(team.rows, b, s) : nullptr;
    const float* bias = norm.bias.base ? norm.bias.at(team.rows, b, s) : nullptr;
    write_token(norm, token, set(float(rstd)), set(float(shift)), weight, bias, Codes(norm.quant, team.rows, b, s));
  }
}

}  // namespace

// Group norm needs 24 bytes of scratch for each channel (rounded up to 16), and of the team's memory 32 bytes
// for each group and thread; layer norm needs none.
extern "C" void tfqc_norm(const void* args, const Team& team) {
  const NormArgs& norm = *static_cast<const NormArgs*>(args);
  if (norm.groups) {
    group_norm(norm, team);
  } else {
    layer_norm(norm, team);
  }
}
