// Pointwise divergences, once for host and device: framework-free.
//
// A functor evaluates f(p, logp, q, logq) and score = df/dlogq for a value type V: a float, a double, or a SIMD vector
// of them. V needs arithmetic, comparison, and the functions kdk_log, kdk_exp and kdk_where found for V by
// argument-dependent or ordinary lookup. Contract: 0 * inf counts as 0, and f = score = 0 where both probabilities are
// 0.
//
// A divergence that is linear in the log-probabilities needs four coefficients only:
//   D = sum p (c_pp logp + c_pq logq) + q (c_qp logp + c_qq logq).
#pragma once

#if defined(__CUDACC__)
#define KDK_HD __host__ __device__ __forceinline__
#else
#define KDK_HD inline __attribute__((always_inline))
#endif

namespace kdk {

struct Linear {
  double c_pp, c_pq, c_qp, c_qq;
};

// The two run-time numbers of a divergence, param0 possibly different for every row.
template <class V>
struct Params {
  V x0, x1;
};

// GUARDED: the logits are 16-bit numbers within known bounds, so that no logarithm is infinite, and one to 3e-7 adds no
// error. What is added to a mixture then keeps it from 0, and is far below the rounding of any that matters.
constexpr float kTiny = 1.17549435e-38f;

// A functor that sees p and q only as weight_p p and weight_q q may say so with a function weighted: the weights of a
// row then go into what normalises it. Where weighted leaves the score out of the value (kLessScore), the scores are
// added up once.
template <class F, class = void>
struct Weighted {
  static constexpr bool value = false, less_score = false;
};
template <class F>
struct Weighted<F, decltype(F::weight_p(Params<float>()), void())> {
  static constexpr bool value = true, less_score = F::kLessScore;
};

// weight * x, and 0 where the weight is 0.
template <bool GUARDED, class V>
KDK_HD V kdk_weigh(V weight, V x) {
  return GUARDED ? weight * x : kdk_where(weight > V{}, weight * x, V{});
}

template <bool GUARDED, class V>
KDK_HD V kdk_log_of(V x) {
  if constexpr (GUARDED) {
    return kdk_log_coarse(x);
  } else {
    return kdk_log(x);
  }
}

// e^(k log x).
template <bool GUARDED, class V>
KDK_HD V kdk_power_of(V logarithm, V k) {
  if constexpr (GUARDED) {
    return kdk_exp2_coarse(logarithm * (k * 1.4426950408889634f));
  } else {
    return kdk_exp(k * logarithm);
  }
}

// m = beta p + (1 - beta) q; f = beta p log(p/m) + (1 - beta) q log(q/m).
struct Jsd {
  static constexpr bool kLessScore = true;
  template <class V>
  KDK_HD static V weight_p(const Params<V>& k) {
    return k.x0;
  }
  template <class V>
  KDK_HD static V weight_q(const Params<V>& k) {
    return V{} + 1.0f - k.x0;
  }
  template <bool GUARDED, class V>
  KDK_HD static void weighted(const Params<V>&, V wp, V logp, V wq, V logq, V& value_less_score, V& score) {
    const V logm = kdk_log_of<GUARDED>(wp + wq);
    score = kdk_weigh<GUARDED>(wq, logq - logm);
    value_less_score = kdk_weigh<GUARDED>(wp, logp - logm);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    weighted<GUARDED>(k, weight_p(k) * p, logp, weight_q(k) * q, logq, value, score);
    value = value + score;
  }
};

// f = |p - q| / 2; the score is 0 where p == q.
struct Tvd {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>&, V p, V, V q, V, V& value, V& score) {
    const V zero = V{}, half = zero + 0.5f;
    const V difference = q - p;
    const V sign = kdk_where(difference > zero, half, kdk_where(difference < zero, -half, zero));
    value = difference * sign;
    score = q * sign;
  }
};

// m = alpha p + (1 - alpha) q; f = p log(p/m).
struct SkewKl {
  static constexpr bool kLessScore = false;
  template <class V>
  KDK_HD static V weight_p(const Params<V>&) {
    return V{} + 1.0f;
  }
  template <class V>
  KDK_HD static V weight_q(const Params<V>& k) {
    return V{} + 1.0f - k.x0;
  }
  template <bool GUARDED, class V>
  KDK_HD static void weighted(const Params<V>& k, V p, V logp, V wq, V, V& value, V& score) {
    const V m = k.x0 * p + (wq + kTiny);
    value = p * (logp - kdk_log_of<GUARDED>(m));
    score = -(p * wq) / m;
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V, V& value, V& score) {
    const V zero = V{}, rest = zero + 1.0f - k.x0;
    const V m = k.x0 * p + rest * q;
    // m may be 0 where the weight is not: alpha times it rounds to 0 for the smallest numbers.
    const auto some = (m > zero) & (p > zero);
    value = kdk_where(some, p * (logp - kdk_log(m)), zero);
    score = kdk_where(some, -rest * p * (q / m), zero);
  }
};

// m = alpha q + (1 - alpha) p; f = q log(q/m).
struct SkewReverseKl {
  static constexpr bool kLessScore = false;
  template <class V>
  KDK_HD static V weight_p(const Params<V>& k) {
    return V{} + 1.0f - k.x0;
  }
  template <class V>
  KDK_HD static V weight_q(const Params<V>&) {
    return V{} + 1.0f;
  }
  // 1 - alpha q / m is (1 - alpha) p / m.
  template <bool GUARDED, class V>
  KDK_HD static void weighted(const Params<V>& k, V wp, V, V q, V logq, V& value, V& score) {
    const V m = k.x0 * q + (wp + kTiny);
    value = q * (logq - kdk_log_of<GUARDED>(m));
    score = value + q * wp / m;
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V, V q, V logq, V& value, V& score) {
    const V zero = V{};
    const V m = k.x0 * q + (zero + 1.0f - k.x0) * p;
    const auto some = (m > zero) & (q > zero);
    value = kdk_where(some, q * (logq - kdk_log(m)), zero);
    score = kdk_where(some, value + q * (zero + 1.0f - k.x0 * (q / m)), zero);
  }
};

// Alpha-beta divergence with a = x0, b = x1; the limits of the value are taken by the caller's choice of functor below.
// score = q^b (q^a - p^a) / a for every a != 0, and q^b (logq - logp) for a = 0.
struct AlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, b = k.x1, zero = V{}, one = zero + 1.0f;
    // The same for all outcomes: what divides by them would be most of the work.
    const V over_a = one / a, over_ab = one / (a * b), over_p = one / (b * (a + b)), over_q = one / (a * (a + b));
    const V p_a = kdk_power_of<GUARDED>(logp, a), q_b = kdk_power_of<GUARDED>(logq, b);
    const V q_a = kdk_power_of<GUARDED>(logq, a), p_b = kdk_power_of<GUARDED>(logp, b);
    value = (p_a * p_b * over_p + q_a * q_b * over_q) - p_a * q_b * over_ab;
    score = q_b * (q_a - p_a) * over_a;
    if constexpr (GUARDED) return;
    const auto dead = (logp == logq) & (p == zero) & (q == zero);
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit a = 0, b != 0: (q^b log(q^b / p^b) - q^b + p^b) / b^2.
struct AlphaBetaZeroA {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V b = k.x1, zero = V{};
    const V q_b = kdk_exp(b * logq), p_b = kdk_exp(b * logp);
    const auto dead = (logp == logq) & (p == zero) & (q == zero);
    score = kdk_where(q_b > zero, q_b * (logq - logp), zero);
    value = (b * score - q_b + p_b) / (b * b);
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit b = 0, a != 0: (p^a log(p^a / q^a) - p^a + q^a) / a^2.
struct AlphaBetaZeroB {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, zero = V{};
    const V q_a = kdk_exp(a * logq), p_a = kdk_exp(a * logp);
    const auto dead = (logp == logq) & (p == zero) & (q == zero);
    value = (kdk_where(p_a > zero, p_a * (a * (logp - logq)), zero) - p_a + q_a) / (a * a);
    score = (q_a - p_a) / a;
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit a + b = 0: ((p/q)^a - a log(p/q) - 1) / a^2.
struct AlphaBetaZeroSum {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, zero = V{};
    const auto dead = (logp == logq) & (p == zero) & (q == zero);
    const V log_ratio = a * (logp - logq);
    const V ratio = kdk_exp(log_ratio);
    value = kdk_where(dead, zero, (ratio - log_ratio - 1.0f) / (a * a));
    score = kdk_where(dead, zero, (zero + 1.0f - ratio) / a);
  }
};

// The limit a = b = 0: (log p - log q)^2 / 2.
struct AlphaBetaZero {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>&, V p, V logp, V q, V logq, V& value, V& score) {
    const V zero = V{};
    const auto dead = (logp == logq) & (p == zero) & (q == zero);
    score = kdk_where(dead, zero, logq - logp);
    value = 0.5f * score * score;
  }
};

// What an alpha-beta divergence is at p = 0: q^(a + b) / (a (a + b)).
struct AlphaBetaNoTeacher {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V, V, V, V logq, V& value, V& score) {
    const V power = kdk_exp((k.x0 + k.x1) * logq);
    score = power / k.x0;
    value = score / (k.x0 + k.x1);
  }
};

}  // namespace kdk
