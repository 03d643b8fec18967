// Maxima and sums over a row of logits, or of numbers.
#pragma once

#include "affine.h"
#include "row.h"

#include <algorithm>
#include <cmath>

namespace kdk {
inline namespace KDK_ISA {

template <class X>
double maximum(const X* x, int64_t n) {
  using C = typename Io<X>::C;
  constexpr int64_t block = Io<X>::kBlock;
  double best = -std::numeric_limits<double>::infinity();
  int64_t j = 0;
  if (n >= block) {
    Vec<C> high = Vec<C>{} - std::numeric_limits<C>::infinity();
    for (; j + block <= n; j += block) {
      Vec<C> a, b;
      Io<X>::load2(x + j, a, b);
      high = max_keep_nan(high, max_keep_nan(a, b));
    }
    best = double(horizontal_max<C>(high));
  }
  for (; j < n; ++j) best = std::max(best, double(to_compute(x[j])));
  return best;
}

// The sum of value(j) over whole vectors j of a tile, in four chains of additions: one would be waited for.
template <class C, class Value>
KDK_INLINE double sum_in_chains(int64_t count, Value value) {
  Vec<C> sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * kLanes<C> <= count; j += 4 * kLanes<C>)
    for (int i = 0; i < 4; ++i) sums[i] += value(j + i * kLanes<C>);
  for (; j < count; j += kLanes<C>) sums[0] += value(j);
  return horizontal_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The same over a row, whatever its length.
template <class C, class Value>
double sum_over_row(int64_t n, Value value) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTileElements)
    total += sum_in_chains<C>(std::min(kTileElements, n - begin),
                              [&](int64_t j) KDK_LAMBDA_INLINE { return value(begin + j); });
  return total;
}

// Index of the first element from begin to end that is a number, or -1.
template <class X>
int64_t first_index(const X* x, int64_t begin, int64_t end, double number) {
  using C = typename Io<X>::C;
  constexpr int64_t block = Io<X>::kBlock;
  int64_t j = begin;
  for (; j + block <= end; j += block) {
    Vec<C> a, b;
    Io<X>::load2(x + j, a, b);
    if (any((a == C(number)) | (b == C(number)))) break;
  }
  for (; j < end; ++j)
    if (double(to_compute(x[j])) == number) return j;
  return -1;
}

// True where the first largest element of both models is the same one; it stands in these tiles.
template <class X, class Y>
bool same_maximum(const Row<X, Y>& row, int64_t tile_s, int64_t tile_t, int64_t n) {
  if (tile_s != tile_t) return false;
  const auto [begin, end] = tile_elements(row, tile_s, n);
  const double best_s = maximum(row.s + begin, end - begin), best_t = maximum(row.t + begin, end - begin);
  return first_index(row.s, begin, end, best_s) == first_index(row.t, begin, end, best_t);
}

// The sum of the logits of a row, less a reference each.
template <class X>
double sum_of_logits(const X* s, int64_t n, double reference = 0) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const C centre = C(reference);
  double total = 0;
  int64_t j = 0;
  while (j + block <= n) {
    V sums[4] = {};
    const int64_t end = std::min(n - n % block, j + kTileElements);
    for (; j + 2 * block <= end; j += 2 * block) {
      for (int i = 0; i < 2; ++i) {
        V a, b;
        Io<X>::load2(s + j + i * block, a, b);
        sums[2 * i] += a - centre;
        sums[2 * i + 1] += b - centre;
      }
    }
    for (; j < end; j += block) {
      V a, b;
      Io<X>::load2(s + j, a, b);
      sums[0] += a - centre;
      sums[1] += b - centre;
    }
    total += horizontal_sum<C>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  for (; j < n; ++j) total += double(to_compute(s[j])) - double(centre);
  if (!std::isfinite(total)) {
    // In double the largest logits have a sum too.
    total = 0;
    for (j = 0; j < n; ++j) total += double(to_compute(s[j])) - double(centre);
  }
  return total + double(n) * (double(centre) - reference);
}

// log(sum of 2^(x c)) in base 2, less the reference of a.
template <class C>
double log2_sum_exp(const C* x, int64_t n, const Affine<C>& a) {
  const int64_t whole = n - n % kLanes<C>;
  double total = sum_over_row<C>(
      whole, [&](int64_t j) KDK_LAMBDA_INLINE { return exp2_fast<5>(clamp_exponent(a(load<Vec<C>>(x + j)))); });
  for (int64_t j = whole; j < n; ++j) total += std::exp2(a.scalar(x[j]));
  return std::log2(total);
}

template <class C>
double log2_sum_exp(const C* x, int64_t n, double c) {
  const Affine<C> a = affine<C>(c, maximum(x, n));
  return a.reference() + log2_sum_exp(x, n, a);
}

// The sum of count numbers, in four chains for each lane.
inline double sum_of_doubles(const double* x, int64_t count) {
  constexpr int64_t lanes = kLanes<double>;
  VecD sums[4] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= count; j += 4 * lanes)
    for (int i = 0; i < 4; ++i) sums[i] += load<VecD>(x + j + i * lanes);
  for (; j + lanes <= count; j += lanes) sums[0] += load<VecD>(x + j);
  double total = horizontal_sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; j < count; ++j) total += x[j];
  return total;
}

// Sum of a row's scratch.
template <class C>
double sum_of(const C* e, int64_t slots) {
  double total = 0;
  for (int64_t j = 0; j < slots;) {
    Vec<C> sum0 = {}, sum1 = {};
    for (const int64_t end = std::min(slots, j + kTileElements); j < end; j += 2 * kLanes<C>) {
      sum0 += load<Vec<C>>(e + j);
      sum1 += load<Vec<C>>(e + j + kLanes<C>);
    }
    total += horizontal_sum<C>(sum0 + sum1);
  }
  return total;
}

}  // namespace KDK_ISA
}  // namespace kdk
