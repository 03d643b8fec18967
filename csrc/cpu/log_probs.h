// Rows of a student that holds log-probabilities, which nothing normalises: q = exp(x) and the gradient is that of the
// sum by every x, so that one pass makes both once the teacher's normaliser is known.
#pragma once

#include "objective.h"
#include "summand.h"
#include "teacher.h"

namespace kdk {
inline namespace KDK_ISA {

// s and t: log-probabilities and logits in C, the room of a vector behind them. The gradient goes to g (null: none).
template <class C>
RowResult log_prob_row(const DenseArgs& args, const RowNumbers& num, const C* s, const C* t, int64_t label, C* g) {
  using V = Vec<C>;
  const int64_t n = args.columns;
  const V zero = {};
  constexpr C nothing = -std::numeric_limits<C>::infinity();
  RowResult result;
  const bool some = num.kd != 0 || args.stats != nullptr;
  const C each = C(-num.weight * num.ce * args.label_smoothing / double(n));
  if (!some) {
    for (int64_t j = 0; g != nullptr && j < n; j += kLanes<C>) store(g + j, zero + each);
  } else {
    const Affine<C> at = affine<C>(num.teacher_scale, maximum(t, n));
    const double log2_zt = log2_sum_exp(t, n, at);
    const V ip = zero + C(std::exp2(-log2_zt)), lzt = zero + C(kLn2 * log2_zt);
    const Params<V> params{zero + C(num.param0), zero + C(args.param1), zero + C(1 - num.param0)};
    const C factor = C(num.weight * num.kd * num.tau);
    double d = 0, mass = 0;
    const auto sweep = [&](int64_t begin, int64_t end, auto summand) KDK_LAMBDA_INLINE {
      V values = {}, masses = {};
      for (int64_t j = begin; j < end; j += kLanes<C>) {
        const V logq = load_within(s, j, n, nothing), xt = at(load_within(t, j, n, nothing));
        const V q = kdk_exp(logq), rounded = exp2_fast<5>(clamp_exponent(xt)) * ip, logp = xt * C(kLn2) - lzt;
        // Apart by no more than rounding they are equal: a sign of what that leaves is no part of a gradient.
        const V apart = rounded - q, least = q * (4 * std::numeric_limits<C>::epsilon());
        const V p = kdk_where((apart <= least) & (-apart <= least), q, rounded);
        V value, score;
        summand(params, p, logp, q, logq, value, score);
        values += value;
        masses += q;
        if (g != nullptr) store(g + j, (num.kd != 0 ? score * factor : zero) + each);
      }
      d += double(horizontal_sum<C>(values));
      mass += double(horizontal_sum<C>(masses));
    };
    with_summand(args.divergence, [&](auto summand) {
      for (int64_t begin = 0; begin < n; begin += kTileElements)
        sweep(begin, std::min(n, begin + kTileElements), summand);
    });
    // Functors see no NaN in a row, and make a number of it.
    if (std::isnan(mass) || !std::isfinite(log2_zt)) {
      d = std::numeric_limits<double>::quiet_NaN();
      if (g != nullptr && num.kd != 0) std::fill(g, g + n, C(d));
    }
    if (num.kd != 0) result.loss = num.kd * num.tau * d;
    result.stats[0] = d;
    if (args.stats != nullptr) {
      Distances<V> sums;
      for (int64_t j = 0; j < n; j += kLanes<C>) {
        const V logq = load_within(s, j, n, nothing), xt = at(load_within(t, j, n, nothing));
        sums.add(exp2_fast<5>(clamp_exponent(xt)) * ip, xt * C(kLn2) - lzt, kdk_exp(logq), logq);
      }
      int k = 3;
      for (const V& sum : {sums.forward, sums.reverse, sums.entropy_p, sums.entropy_q})
        result.stats[k++] = horizontal_sum<C>(sum);
      result.stats[7] = std::max_element(s, s + n) - s == std::max_element(t, t + n) - t;
      result.stats[8] = horizontal_sum<C>(sums.overlap);
      const Affine<C> a = affine<C>(kLog2e, maximum(s, n));
      result.stats[2] = a.logit() + kLn2 * log2_sum_exp(s, n, a);
    }
  }
  if (args.values_ce(num.ce)) {
    const double cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, 0, 0);
    if (num.ce != 0) result.loss += num.ce * cross_entropy;
    result.stats[1] = cross_entropy;
    if (num.ce != 0 && g != nullptr && label >= 0 && label < n)
      g[label] -= C(num.weight * num.ce * (1 - args.label_smoothing));
  }
  return result;
}

template <class X>
void log_prob_rows(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const int64_t n = args.columns;
  Scratch<C>& scratch = Scratch<C>::mine();
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    RowNumbers num = row_numbers<C>(args, row, weight);
    const C* t = teacher_row<C>(args, row, num.teacher_scale);
    C* s = scratch.get(kStudentRow, n);
    widen_row(args.student, row, args.length, n, s, AsIs());
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, n);
    const RowResult result = log_prob_row<C>(args, num, s, t, label, g);
    if (g != nullptr) narrow_row(n, out, Stored<C>{g});
    put_stats<C>(args, row, result);
    return result.loss;
  });
}

}  // namespace KDK_ISA
}  // namespace kdk
