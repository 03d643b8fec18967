// The rows that are left to exact_row.h, because fp32 keeps too little of them.
#pragma once

#include "reduce.h"

#include <cmath>
#include <limits>

namespace kdk {
inline namespace KDK_ISA {

// Rows go to exact_row where their cancellation shows: the divergence is below kNearlyEqual, and one token has all but
// kFairlySure of the student's probability, or the largest has more than kTop and the models agree on those next to it
// (see agree); or it has all but kSure, and with it vanishes the gradient.
constexpr double kFairlySure = 0.5, kSure = 0x1p-10, kTop = 0x1p-4;
// Below this models need not be asked on which tokens they agree. And both KLs together, whose errors cancel in plain
// PyTorch, are asked for up to more.
constexpr double kAlike = 0x1p-20, kNearForBoth = 0x1p-3;
// Without fused multiply-adds the logits of near models are rounded apart when they are scaled.
constexpr double kNearlyEqual = kFused ? 0x1p-6 : 0x1p-4;

// The largest logits of the parts of a row, so that those next to the largest of all need be looked for in few of them.
template <class X>
struct Peaks {
  static constexpr int64_t kParts = 64;
  const X* x;
  int64_t n, part;
  int parts = 0, best = 0;
  double of_part[kParts], highest = -std::numeric_limits<double>::infinity();

  Peaks(const X* logits, int64_t length)
      : x(logits), n(length), part(std::max<int64_t>(512, (length + kParts - 1) / kParts)) {
    for (int64_t begin = 0; begin < n; begin += part) {
      const double high = maximum(x + begin, std::min(part, n - begin));
      of_part[parts] = high;
      if (high > highest) highest = high, best = parts;
      ++parts;
    }
  }
};

// True where a few tokens, the largest with a share of top, have most of the student's mass, and the models agree on
// them and differ in the others: beside the terms of those few their differences are rounded away. distance: a forward
// KL. Where each token differs by as much as any, the mean square here is twice the distance. A distance that is less
// than the error of the exponentials may be anything below it.
template <class X, class Y, class C>
__attribute__((noinline)) bool agree(const Row<X, Y>& row, const Peaks<X>& peaks, const Affine<C>& as,
                                     const Affine<C>& at, double log2_zs, double log2_zt, double top, double distance) {
  constexpr int64_t block = Io<X>::kBlock;
  constexpr double error = kExpDegree<X> < 5 ? 0x1p-18 : 0x1p-22;
  const double lowest = peaks.highest - 4 / double(as.c), bound = 0.125 * std::max(distance, error);
  double squares = 0, weights = 0, mass = 0;
  const auto see = [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const double s = double(to_compute(row.s[j]));
      if (!(s >= lowest)) continue;
      const double log2_q = as.scalar(s) - log2_zs, log2_p = at.scalar(double(to_compute(row.t[j]))) - log2_zt;
      const double q = std::exp2(log2_q), d = kLn2 * (log2_p - log2_q);
      squares += q * q * d * d, weights += q * q, mass += q;
    }
  };
  // Models that do not agree are told by the largest of all already, mostly: the weights are at most top.
  for (int i = 0; i < peaks.parts && squares < bound * top; ++i) {
    const int k = i == 0 ? peaks.best : i <= peaks.best ? i - 1 : i;
    if (!(peaks.of_part[k] >= lowest)) continue;
    int64_t j = k * peaks.part;
    const int64_t end = std::min(row.n, j + peaks.part);
    for (; j + block <= end; j += block) {
      Vec<C> a, b;
      Io<X>::load2(row.s + j, a, b);
      if (any((a >= C(lowest)) | (b >= C(lowest)))) see(j, j + block);
    }
    see(j, end);
  }
  return mass > 0.5 && squares < bound * weights;
}

}  // namespace KDK_ISA
}  // namespace kdk
