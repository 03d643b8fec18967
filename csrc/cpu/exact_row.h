// Rows of which fp32 keeps too little, in double: one token has all but a rounding of the probability, or the two
// models hardly differ, or have hardly anything in common, or a logit at its temperature passes the range of floats.
// Slower than a sweep by about five times, and taken for such rows alone; compiled with the kernels of fp64.
#pragma once

#include "dense_kernels.h"

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
  KDK_INLINE VecD logs(int64_t j) const { return load<VecD>(x + j) * scale - log_z; }
  KDK_INLINE VecD probabilities(int64_t j) const { return unfused(load<VecD>(e + j) * inverse_z); }
};

struct Found {
  double value = 0, score = 0;
};

// Values and scores of a row by a functor; of apart, see divergences.h.
template <class F>
Found evaluate(const Model& q, const Model& p, double x0, double x1, int64_t n, double* scores) {
  const Params<VecD> params{VecD{} + x0, VecD{} + x1};
  const auto row = [&](auto apart) {
    VecD values = {}, sum = {};
    for (int64_t j = 0; j < n; j += kStep) {
      VecD value, score;
      if constexpr (Paired<F>::value) {
        F::template paired<apart>(params, p.probabilities(j), q.probabilities(j), value, score);
      } else {
        F::eval(params, p.probabilities(j), p.logs(j), q.probabilities(j), q.logs(j), value, score);
      }
      values += value, sum += score;
      store(scores + j, score);
    }
    const double score = horizontal_sum<double>(sum);
    return Found{horizontal_sum<double>(values) + (Paired<F>::less_score ? score : 0), score};
  };
  Found found = row(std::false_type());
  if constexpr (Paired<F>::value) {
    if (found.score > 0.5 * F::limit(x0)) found.score = row(std::true_type()).score;
  }
  return found;
}

// The same for what is linear in the log-probabilities; where a probability is 0 a logarithm may be infinite.
inline Found evaluate(const Linear& k, const Model& q, const Model& p, int64_t n, double* scores) {
  VecD values = {}, sum = {};
  const VecD zero = {};
  const auto times = [](double c, VecD x) { return c == 0 ? VecD{} : c * x; };
  for (int64_t j = 0; j < n; j += kStep) {
    const VecD vp = p.probabilities(j), vq = q.probabilities(j), logp = p.logs(j), logq = q.logs(j);
    // Where the two logarithms come as a difference it is taken first: both may be infinite.
    const auto over = [&](double c_p, double c_q) {
      if (c_p + c_q == 0) return times(c_p, kdk_where(logp == logq, zero, logp - logq));
      return times(c_p, logp) + times(c_q, logq);
    };
    const VecD over_p = kdk_where(vp > zero, vp * over(k.c_pp, k.c_pq), zero);
    const VecD over_q = kdk_where(vq > zero, vq * over(k.c_qp, k.c_qq), zero);
    const VecD score = k.c_pq * vp + k.c_qq * vq + over_q;
    values += over_p + over_q, sum += score;
    if (scores != nullptr) store(scores + j, score);
  }
  return {horizontal_sum<double>(values), horizontal_sum<double>(sum)};
}

struct Divergence {
  Found (*evaluate)(const Model&, const Model&, double, double, int64_t, double*) = nullptr;
  Linear coefficients = {};
  template <class F>
  constexpr Divergence(General<F>) : evaluate(exact::evaluate<F>) {}
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
  room.resize(size_t(3 * whole));
  Model q{s, kLn2 * num.student_scale, room.data()}, p{t, kLn2 * num.teacher_scale, q.e + whole};
  double* const scores = p.e + whole;
  const exact::Divergence& divergence = exact::kDivergences[args.divergence];
  RowResult result;
  if (num.kd != 0 || args.stats != nullptr) {
    q.sweep(n), p.sweep(n);
    const Found found = divergence.evaluate != nullptr ? divergence.evaluate(q, p, num.param0, args.param1, n, scores)
                                                       : evaluate(divergence.coefficients, q, p, n, scores);
    result.stats[0] = found.value;
    if (num.kd != 0) result.loss = num.kd * num.tau * found.value;
    if (args.stats != nullptr) {
      // Of the scores nothing is lost: they are read below, and these write none.
      result.stats[3] = evaluate({1, -1, 0, 0}, q, p, n, nullptr).value;
      result.stats[4] = evaluate({0, 0, -1, 1}, q, p, n, nullptr).value;
      result.stats[5] = evaluate({-1, 0, 0, 0}, q, p, n, nullptr).value;
      result.stats[6] = evaluate({0, 0, 0, -1}, q, p, n, nullptr).value;
      result.stats[7] = q.top == p.top;
      result.stats[8] = sum_in_chains<double>(
          whole, [&](int64_t j) KDK_LAMBDA_INLINE { return min_of(p.probabilities(j), q.probabilities(j)); });
    }
    if (g != nullptr) {
      const double f = num.weight * num.kd * num.tau * q.scale;
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
  if (num.ce != 0) cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, 0, hard.log_z);
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
