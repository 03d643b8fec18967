// Rows of which fp32 keeps too little, in double: few tokens have nearly all the probability and the models agree on
// them, or the two models have hardly anything in common, or a logit at its temperature passes the range of floats.
// Slower than a sweep by about five times, and taken for such rows alone; compiled with the kernels of fp64.
#pragma once

#include "objective.h"

namespace kdk {
inline namespace KDK_ISA {
namespace exact {

constexpr int64_t kStep = kLanes<double>;

// e^x for x <= 0 to about 1 ulp; 0 below the normal range. x = n log 2 + r, Taylor to r^13 on |r| < 0.35.
KDK_INLINE VecD exponential(VecD x) {
  const VecD lowest = VecD{} - 708.0, c = max_keep_nan(lowest, x);
  const double magic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52: adding it rounds to an integer; 1023: the bias
  const VecD shifted = c * kLog2e + magic, n = shifted - magic;
  const VecD r = (c - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  VecD poly = VecD{} + 1.0 / 6227020800.0;
  double factorial = 6227020800.0;
  for (int k = 13; k > 0; --k) {
    factorial /= k;
    poly = poly * r + 1.0 / factorial;
  }
  return kdk_where(x < lowest, VecD{}, poly * bit_cast<VecD>(bit_cast<VecL>(shifted) << 52));
}

// A model's exponentials relative to its largest logit, which stands apart: 1 less its probability is not lost.
struct Model {
  const double* x;  // logits less the largest
  double scale;     // 1 / T
  double* e;
  int64_t top = 0;  // the first of the largest
  double rest = 0;  // the sum of all others
  double log_z = 0, inverse_z = 0;

  void sweep(int64_t n) {
    top = std::find(x, x + n, 0.0) - x;
    for (int64_t j = 0; j < n; j += kStep) store(e + j, exponential(load<VecD>(x + j) * scale));
    if (top < n) e[top] = 0;
    rest = sum_in_chains<double>((n + kStep - 1) / kStep * kStep,
                                 [&](int64_t j) KDK_LAMBDA_INLINE { return load<VecD>(e + j); });
    // A row of NaN has no largest logit.
    if (top < n) e[top] = 1;
    log_z = std::log1p(rest);
    inverse_z = top < n ? 1 / (1 + rest) : std::numeric_limits<double>::quiet_NaN();
  }
  // From here on p = e^(x - lse).
  void normalize(double lse) {
    log_z = lse;
    // A row of NaN stays one.
    if (inverse_z == inverse_z) inverse_z = std::exp(-lse);
  }
  KDK_INLINE VecD tempered(int64_t j) const { return unfused(load<VecD>(x + j) * scale); }
  KDK_INLINE VecD logs(int64_t j) const { return tempered(j) - log_z; }
  KDK_INLINE VecD probabilities(int64_t j) const { return unfused(load<VecD>(e + j) * inverse_z); }
};

// (e^d - 1 - d) / d^2 for |d| < 1/2: the Taylor series.
KDK_INLINE VecD second_difference(VecD d) {
  VecD sum = VecD{} + 1.0 / 20922789888000.0;
  double factorial = 20922789888000.0;
  for (int k = 16; k > 2; --k) {
    factorial /= k;
    sum = sum * d + 1.0 / factorial;
  }
  return sum;
}

// log p - log q, and p - q from it: relative to the difference itself, however many tokens the models agree on. From p
// and q they would be relative to these, and tokens that share the mass would drown all others.
struct Differences {
  const Model &q, &p;
  double* d;
  static constexpr double kSmall = 0.5;

  // same: both are distributions.
  void find(int64_t n, bool same) {
    const auto excess = [&](int64_t j) KDK_LAMBDA_INLINE { return load<VecD>(p.e + j) - load<VecD>(q.e + j); };
    const double of_z = sum_in_chains<double>((n + kStep - 1) / kStep * kStep, excess) * q.inverse_z;
    const double shift = same && std::abs(of_z) < kSmall ? std::log1p(of_z) : p.log_z - q.log_z;
    for (int64_t j = 0; j < n; j += kStep) {
      const VecD xp = p.tempered(j), xq = q.tempered(j);
      // Both may be infinite.
      store(d + j, kdk_where(xp == xq, VecD{}, xp - xq) - shift);
    }
  }
  KDK_INLINE VecD of_logs(int64_t j) const { return load<VecD>(d + j); }
  KDK_INLINE static auto small(VecD x) { return (x < kSmall) & (x > -kSmall); }
  KDK_INLINE VecD of_probabilities(int64_t j) const {
    const VecD x = of_logs(j), vq = q.probabilities(j), near = kdk_where(small(x), x, VecD{});
    return kdk_where(small(x), vq * (near + near * near * second_difference(near)), p.probabilities(j) - vq);
  }
};

struct Found {
  double value = 0, score = 0;
};

// Values and scores of a row by a functor; of the forms of a score see divergences.h.
template <class F>
Found evaluate(const Differences& models, double x0, double x1, int64_t n, double* scores) {
  const Params<VecD> params{VecD{} + x0, VecD{} + x1, VecD{} + (1 - x0)};
  const auto row = [&](auto form) {
    VecD values = {}, sum = {};
    for (int64_t j = 0; j < n; j += kStep) {
      const VecD vp = models.p.probabilities(j), vq = models.q.probabilities(j);
      VecD value, score;
      if constexpr (Paired<F>::value) {
        F::template of_difference<form>(params, vp, vq, models.of_probabilities(j), value, score);
      } else {
        F::eval(params, vp, models.p.logs(j), vq, models.q.logs(j), value, score);
      }
      if constexpr (std::is_base_of_v<OfAlphaBeta, F>) {
        const VecD x = models.of_logs(j);
        VecD near_value, near_score;
        AlphaBetaNear::of_difference(params, vp, models.p.logs(j), vq, models.q.logs(j), x, near_value, near_score);
        value = kdk_where(Differences::small(x), near_value, value);
        score = kdk_where(Differences::small(x), near_score, score);
      }
      values += value, sum += score;
      store(scores + j, score);
    }
    const double score = horizontal_sum<double>(sum);
    return Found{horizontal_sum<double>(values) + (Paired<F>::less_score ? score : 0), score};
  };
  if constexpr (Paired<F>::value) {
    Found found = row(std::integral_constant<Score, Score::kNear>());
    if (found.score > 0.5 * F::near_limit(x0)) found.score = row(std::integral_constant<Score, Score::kApart>()).score;
    return found;
  }
  return row(std::integral_constant<Score, Score::kPlain>());
}

// The same for what is linear in the log-probabilities, with the two KLs as sums of q - p + p log(p/q) and of p - q + q
// log(q/p), of which nothing cancels: none is below 0. A score is less the multiple of q that it is where the models
// are equal. Where a probability is 0 a logarithm may be infinite.
inline Found evaluate(const Linear& k, const Differences& models, int64_t n, double* scores) {
  const VecD zero = {}, one = zero + 1.0;
  const double of_p = k.c_pp + k.c_pq, of_q = k.c_qp + k.c_qq;
  VecD forward = {}, reverse = {}, p_logp = {}, q_logq = {};
  for (int64_t j = 0; j < n; j += kStep) {
    const VecD vp = models.p.probabilities(j), vq = models.q.probabilities(j), d = models.of_logs(j);
    const auto small = Differences::small(d), some_p = vp > zero, some_q = vq > zero;
    const VecD near = kdk_where(small, d, zero), square = near * near, second = second_difference(near);
    const VecD p_less_q = kdk_where(small, vq * (near + square * second), vp - vq);
    const VecD q_d = kdk_where(some_q, vq * d, zero);
    const VecD far_forward = kdk_where(some_p, vp * d, zero) - p_less_q, far_reverse = p_less_q - q_d;
    forward += kdk_where(small, vq * square * (one + (near - one) * second), far_forward);
    reverse += kdk_where(small, vq * square * second, far_reverse);
    VecD score = q_d * k.c_qp;
    if (k.c_qp == 0) score = zero;
    if (of_p != 0) p_logp += kdk_where(some_p, vp * models.p.logs(j), zero);
    if (of_q != 0) {
      const VecD entropy = kdk_where(some_q, vq * models.q.logs(j), zero);
      q_logq += entropy, score += of_q * entropy;
    }
    if (scores != nullptr) store(scores + j, score + k.c_pq * p_less_q);
  }
  const auto times = [](double c, VecD x) { return c == 0 ? 0 : c * horizontal_sum<double>(x); };
  const double score = times(of_q, q_logq) - times(k.c_qp, reverse);
  return {times(of_p, p_logp) - times(k.c_pq, forward) + score, score};
}

struct Divergence {
  Found (*evaluate)(const Differences&, double, double, int64_t, double*) = nullptr;
  Linear coefficients = {};
  Outer outer = Outer::kNone;
  template <class F>
  constexpr Divergence(General<F>) : evaluate(exact::evaluate<F>), outer(OuterOf<F>::value) {}
  constexpr Divergence(OfLogs entry) : coefficients(entry.coefficients) {}
};
#include "kdkernels/divergence_table.h"

}  // namespace exact

// s and t: logits less the largest of their row, which is top_logit of the student; whole vectors of them. The gradient
// goes to g, where that is not null, and the weight is in it.
RowResult exact_row(const DenseArgs& args, const RowNumbers& num, double* s, double* t, double top_logit, int64_t label,
                    double* g) {
  using namespace exact;
  const int64_t n = args.columns, whole = (n + kStep - 1) / kStep * kStep;
  std::fill(s + n, s + whole, -std::numeric_limits<double>::infinity());
  std::fill(t + n, t + whole, -std::numeric_limits<double>::infinity());
  static thread_local std::vector<double> room;
  room.resize(size_t(4 * whole));
  Model q{s, kLn2 * num.student_scale, room.data()}, p{t, kLn2 * num.teacher_scale, q.e + whole};
  double* const scores = p.e + whole;
  Differences models{q, p, scores + whole};
  const exact::Divergence& divergence = exact::kDivergences[args.divergence];
  RowResult result;
  if (num.kd != 0 || args.stats != nullptr) {
    q.sweep(n), p.sweep(n);
    const bool general = divergence.evaluate != nullptr, elsewhere = args.teacher_lse.data != nullptr;
    const double mass = elsewhere ? std::exp(p.log_z - num.teacher_lse) : 1;
    if (elsewhere && general) p.normalize(num.teacher_lse);
    models.find(n, !(elsewhere && general));
    const auto overlap = [&] {
      return sum_in_chains<double>(
          whole, [&](int64_t j) KDK_LAMBDA_INLINE { return min_of(p.probabilities(j), q.probabilities(j)); });
    };
    const bool crowded = elsewhere && general && mass > kMassOfAll && divergence.outer != Outer::kHybrid;
    const double rate = divergence.outer != Outer::kNone || crowded ? overlap() : 0;
    const double param0 = divergence.outer == Outer::kHybrid ? std::exp(-num.param0 * rate) : num.param0;
    const Found found = general ? divergence.evaluate(models, param0, args.param1, n, scores)
                                : evaluate(divergence.coefficients, models, n, scores);
    double d = elsewhere && general ? found.value : at_least_0(found.value), slope = 1;
    if (crowded) {
      d = 1 - rate + 0 * d;
    } else if (elsewhere && general) {
      d += (divergence.outer == Outer::kHybrid ? 1 - param0 : 1) * 0.5 * (1 - mass);
    }
    if (elsewhere && !general) {
      d = of_mass(d, mass, divergence.coefficients.c_pp);
      slope = mass;
    }
    if (divergence.outer == Outer::kNegativeLog) {
      const Outside outside = negative_log_acceptance(d, rate, num.param0);
      d = outside.value;
      slope = outside.slope;
    }
    result.stats[0] = d;
    if (num.kd != 0) result.loss = num.kd * num.tau * result.stats[0];
    if (args.stats != nullptr) {
      // Of the scores nothing is lost: they are read below, and these write none.
      result.stats[3] = evaluate({1, -1, 0, 0}, models, n, nullptr).value;
      result.stats[4] = evaluate({0, 0, -1, 1}, models, n, nullptr).value;
      result.stats[5] = evaluate({-1, 0, 0, 0}, models, n, nullptr).value;
      result.stats[6] = evaluate({0, 0, 0, -1}, models, n, nullptr).value;
      result.stats[7] = q.top == p.top;
      result.stats[8] = overlap();
    }
    if (g != nullptr) {
      const double f = num.weight * num.kd * num.tau * q.scale * slope;
      VecD others = {};
      for (int64_t j = 0; j < whole; j += kStep) {
        const VecD x = num.kd == 0 ? VecD{} : f * (load<VecD>(scores + j) - q.probabilities(j) * found.score);
        store(g + j, x);
        others += x;
      }
      // All add up to 0. At the largest logit the two terms nearly cancel where it has all the probability.
      if (q.top < n && q.rest < 1) g[q.top] -= horizontal_sum<double>(others);
      if (num.kd == 0) std::fill(g, g + whole, 0.0);
    }
  } else if (g != nullptr) {
    std::fill(g, g + whole, 0.0);
  }
  if (num.ce == 0 && num.z == 0 && args.stats == nullptr) return result;

  Model hard{s, 1, q.e};
  hard.sweep(n);
  const double lse = top_logit + hard.log_z;
  double cross_entropy = 0;
  if (args.values_ce(num.ce)) cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, 0, hard.log_z);
  result.loss += (num.ce != 0 ? num.ce * cross_entropy : 0) + (num.z != 0 ? num.z * lse * lse : 0);
  result.stats[1] = cross_entropy;
  result.stats[2] = lse;
  if (g == nullptr || (num.ce == 0 && num.z == 0)) return result;
  const double each = num.weight * num.ce * args.label_smoothing / double(n);
  const double of_z = num.z != 0 ? 2 * num.weight * num.z * lse : 0;
  for (int64_t j = 0; j < whole; j += kStep)
    store(g + j, load<VecD>(g + j) + (num.weight * num.ce + of_z) * hard.probabilities(j) - each);
  if (num.ce != 0 && label >= 0 && label < n) {
    const double share = num.weight * num.ce;
    g[label] -= share * (1 - args.label_smoothing);
    // 1 less the probability of the largest is not lost.
    if (label == hard.top && hard.top < n && hard.rest < 1)
      g[label] += share * ((1 - hard.inverse_z) - hard.rest * hard.inverse_z);
  }
  return result;
}

}  // namespace KDK_ISA
}  // namespace kdk
