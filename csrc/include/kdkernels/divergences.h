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

#include <cmath>

#if defined(__CUDACC__)
#define KDK_HD __host__ __device__ __forceinline__
#else
#define KDK_HD inline __attribute__((always_inline))
#endif

namespace kdk {

struct Linear {
  double c_pp, c_pq, c_qp, c_qq;
};

// The two run-time numbers of a divergence, param0 possibly different for every row, and 1 - param0: taken before
// param0 is rounded, which next to 1 would take most of it.
template <class V>
struct Params {
  V x0, x1, rest;
};

// GUARDED: the logits are 16-bit numbers within known bounds, so that no logarithm is infinite, and one to 3e-7 adds no
// error.

// Added to a mixture it keeps that from 0, and is far below the rounding of any that matters.
constexpr float kTiny = 1.17549435e-38f;

// A functor that needs the probabilities alone has a function paired too. It takes logarithms of ratios, so that these
// agree with the probabilities, and its value may differ by a multiple of q - p, whose sum is 0: relative errors of p
// and q then change the divergence of near models to the second order only. It needs kdk_inverse, and kdk_log_ratio(u,
// u - 1), the logarithm of u, or any number where u is 0. Where the teacher has no mass a score is nearly a constant
// times q, which adds nothing to a gradient and cancels in it; as kApart the score is less that multiple of q, and
// limit is what it sums to over such a row. Likewise it is a multiple of q where the models agree, and as kNear less
// that, with near_limit. Where paired leaves the score out of the value (kLessScore), the scores are added up once.
// of_difference is told p - q, which may be known better than p and q. A small value stands for a forward KL of about
// as_forward_kl.
enum class Score { kPlain, kNear, kApart };

template <class F, class = void>
struct Paired {
  static constexpr bool value = false, less_score = false;
};
template <class F>
struct Paired<F, decltype(void(F::kLessScore))> {
  static constexpr bool value = true, less_score = F::kLessScore;
};

// Facts for sparse teachers, which give nothing to most outcomes. Where f(0, q) = q f(0, 1) (kLinearWithoutTeacher) the
// mass of q stands for all of these; of other functors each outcome is asked, by a functor for p = 0 alone where there
// is one (NoTeacher).
template <class F, class = void>
struct LinearWithoutTeacher {
  static constexpr bool value = false;
};
template <class F>
struct LinearWithoutTeacher<F, decltype(void(F::kLinearWithoutTeacher))> {
  static constexpr bool value = F::kLinearWithoutTeacher;
};
template <class F, class = void>
struct WithoutTeacher {
  using Functor = F;
};
template <class F>
struct WithoutTeacher<F, decltype(void(sizeof(typename F::NoTeacher)))> {
  using Functor = typename F::NoTeacher;
};

// weight * x, and 0 where the weight is 0.
template <class V>
KDK_HD V kdk_weigh(V weight, V x) {
  return kdk_where(weight > V{}, weight * x, V{});
}

// e^x.
template <bool GUARDED, class V>
KDK_HD V kdk_power_of(V logarithm) {
  if constexpr (GUARDED) {
    return kdk_exp2_coarse(logarithm * 1.4426950408889634f);
  } else {
    return kdk_exp(logarithm);
  }
}

// m = beta p + (1 - beta) q; f = beta p log(p/m) + (1 - beta) q log(q/m).
struct Jsd {
  static constexpr bool kLinearWithoutTeacher = true;
  static constexpr bool kLessScore = true;
  static double limit(double beta) { return -(1 - beta) * std::log1p(-beta); }
  static double near_limit(double beta) { return limit(beta); }
  static double as_forward_kl(double value, double beta) { return value / (beta * (1 - beta)); }
  template <Score FORM, class V>
  KDK_HD static void of_difference(const Params<V>& k, V p, V q, V p_less_q, V& value_less_score, V& score) {
    const V rest = k.rest, wp = k.x0 * p, wq = rest * q;
    const V over_m = kdk_inverse(wp + (wq + kTiny)), difference = p_less_q * over_m;
    value_less_score = wp * kdk_log_ratio(p * over_m, rest * difference);
    score = FORM == Score::kApart ? wq * kdk_log_ratio(wq * over_m, -wp * over_m)
                                  : wq * kdk_log_ratio(q * over_m, -k.x0 * difference);
  }
  template <class V>
  KDK_HD static void paired(const Params<V>& k, V p, V q, V& value_less_score, V& score) {
    of_difference<Score::kPlain>(k, p, q, p - q, value_less_score, score);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V wp = k.x0 * p, wq = k.rest * q, logm = kdk_log(wp + wq);
    score = kdk_weigh(wq, logq - logm);
    value = kdk_weigh(wp, logp - logm) + score;
  }
};

// f = |p - q| / 2; the score is 0 where p == q.
struct Tvd {
  static constexpr bool kLinearWithoutTeacher = true;
  static constexpr bool kLessScore = false;
  static double limit(double) { return 0.5; }
  static double near_limit(double) { return limit(0); }
  static double as_forward_kl(double value, double) { return 2 * value * value; }
  template <Score FORM, class V>
  KDK_HD static void by_sign(V q, V difference, V& value, V& score) {
    const V zero = V{}, half = zero + 0.5f;
    const V sign = kdk_where(difference > zero, half, kdk_where(difference < zero, -half, zero));
    value = difference * sign;
    score = q * (FORM == Score::kApart ? sign - half : sign);
  }
  template <Score FORM, class V>
  KDK_HD static void of_difference(const Params<V>&, V, V q, V p_less_q, V& value, V& score) {
    by_sign<FORM>(q, -p_less_q, value, score);
  }
  template <class V>
  KDK_HD static void paired(const Params<V>&, V p, V q, V& value, V& score) {
    by_sign<Score::kPlain>(q, q - p, value, score);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V, V q, V, V& value, V& score) {
    paired(k, p, q, value, score);
  }
};

// m = alpha p + (1 - alpha) q; f = p log(p/m).
struct SkewKl {
  static constexpr bool kLinearWithoutTeacher = true;
  static constexpr bool kLessScore = false;
  // The score is small where the teacher has no mass.
  static double limit(double) { return HUGE_VAL; }
  static double near_limit(double alpha) { return 1 - alpha; }
  static double as_forward_kl(double value, double alpha) { return value / ((1 - alpha) * (1 - alpha)); }
  // 1 - p / m is (1 - alpha) (q - p) / m.
  template <Score FORM, class V>
  KDK_HD static void of_difference(const Params<V>& k, V p, V q, V p_less_q, V& value, V& score) {
    const V rest = k.rest, difference = rest * p_less_q;
    const V over_m = kdk_inverse(k.x0 * p + (rest * q + kTiny));
    value = p * kdk_log_ratio(p * over_m, difference * over_m) - difference;
    score = -(rest * (FORM == Score::kNear ? difference : p)) * (q * over_m);
  }
  template <class V>
  KDK_HD static void paired(const Params<V>& k, V p, V q, V& value, V& score) {
    of_difference<Score::kPlain>(k, p, q, p - q, value, score);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V, V& value, V& score) {
    const V zero = V{}, rest = k.rest;
    const V m = k.x0 * p + rest * q;
    // m may be 0 where the weight is not: alpha times it rounds to 0 for the smallest numbers.
    const auto some = (m > zero) & (p > zero);
    value = kdk_where(some, p * (logp - kdk_log(m)), zero);
    score = kdk_where(some, -rest * p * (q / m), zero);
  }
};

// m = alpha q + (1 - alpha) p; f = q log(q/m).
struct SkewReverseKl {
  static constexpr bool kLinearWithoutTeacher = true;
  static constexpr bool kLessScore = false;
  static double limit(double alpha) { return -std::log(alpha); }
  static double near_limit(double alpha) { return limit(alpha) - (1 - alpha); }
  static double as_forward_kl(double value, double alpha) { return value / ((1 - alpha) * (1 - alpha)); }
  // 1 - alpha q / m is (1 - alpha) p / m, and that less 1 - alpha is alpha (1 - alpha) (p - q) / m.
  template <Score FORM, class V>
  KDK_HD static void of_difference(const Params<V>& k, V p, V q, V p_less_q, V& value, V& score) {
    const V rest = k.rest, wp = rest * p;
    const V over_m = kdk_inverse(k.x0 * q + (wp + kTiny)), share = wp * over_m, difference = -(rest * p_less_q);
    const V term = q * kdk_log_ratio(q * over_m, difference * over_m);
    value = term - difference;
    score = q * (FORM == Score::kNear ? -(k.x0 * difference) * over_m : share) +
            (FORM == Score::kApart ? q * kdk_log_ratio(k.x0 * q * over_m, -share) : term);
  }
  template <class V>
  KDK_HD static void paired(const Params<V>& k, V p, V q, V& value, V& score) {
    of_difference<Score::kPlain>(k, p, q, p - q, value, score);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V, V q, V logq, V& value, V& score) {
    const V zero = V{};
    const V m = k.x0 * q + k.rest * p;
    const auto some = (m > zero) & (q > zero);
    value = kdk_where(some, q * (logq - kdk_log(m)), zero);
    score = kdk_where(some, value + q * (zero + 1.0f - k.x0 * (q / m)), zero);
  }
};

// f = (1 - r) p log(p/q) + r q log(q/p), of r = x0 and 1 - r where one of them may be 0.
struct MixedKl {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V wp = k.rest * p, wq = k.x0 * q, of_q = kdk_weigh(wq, logq - logp);
    value = kdk_weigh(wp, logp - logq) + of_q;
    score = of_q + (wq - wp);
  }
};

// A function of a row's sums before its gradient, by functors that only the dense pattern of the CPU takes; see
// negative_log_acceptance and ObjectiveRow in csrc/cpu.
enum class Outer { kNone, kNegativeLog, kHybrid };
template <class F, class = void>
struct OuterOf {
  static constexpr Outer value = Outer::kNone;
};
template <class F>
struct OuterOf<F, decltype(void(F::kOuter))> {
  static constexpr Outer value = F::kOuter;
};

// -log(1 - TVD); its parameter is the least that the logarithm sees.
struct LkNegativeLog : Tvd {
  static constexpr Outer kOuter = Outer::kNegativeLog;
};

// f = x0 p log(p/q) + (1 - x0) |p - q| / 2, where x0 is made of the row's acceptance rate and the parameter.
struct LkHybrid {
  static constexpr Outer kOuter = Outer::kHybrid;
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V wp = k.x0 * p;
    Tvd::by_sign<Score::kPlain>(q, q - p, value, score);
    value = k.rest * value + kdk_weigh(wp, logp - logq);
    score = k.rest * score - wp;
  }
};

// f = (p - q)^2 / (p + q).
struct Triangular {
  static constexpr bool kLinearWithoutTeacher = true;
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>&, V p, V, V q, V, V& value, V& score) {
    const V m = p + q, share = (q - p) / (m + kTiny);
    value = (q - p) * share;
    score = q * share * ((p + m + p) / (m + kTiny));
  }
};

// Alpha-beta divergences have a = x0, b = x1 and c = a + b. With d = log p - log q the value is
//   f = q^c d^2 [exp at 0, a d, c d],   the second divided difference of exp,
// which is positive for all a and b and has all their limits in it, and the score is -q^c d [exp at 0, a d]. An outcome
// that neither model can give has none of either.
template <class V>
KDK_HD auto kdk_dead(V p, V logp, V q, V logq) {
  return (logp == logq) & (p == V{}) & (q == V{});
}

// An alpha-beta divergence at p = 0: q^(a + b) / (a (a + b)).
struct AlphaBetaNoTeacher {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V, V, V, V logq, V& value, V& score) {
    const V power = kdk_exp((k.x0 + k.x1) * logq);
    score = power / k.x0;
    value = score / (k.x0 + k.x1);
  }
};

struct OfAlphaBeta {
  using NoTeacher = AlphaBetaNoTeacher;
};
// Where powers are infinite so is the value; the score has the sign of log q - log p.
constexpr float kHuge = 3.402823466e38f;

// The divided difference written out, for a and b above 0 and not near it. Every power is one exponential: a product of
// two would be 0 * inf where a parameter is negative.
struct AlphaBeta : OfAlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, b = k.x1, c = a + b, zero = V{}, one = zero + 1.0f;
    // The same for all outcomes: what divides by them would be most of the work.
    const V over_a = one / a, over_p = one / (b * c), over_q = one / (a * c);
    const V of_p = kdk_power_of<GUARDED>(c * logp), of_q = kdk_power_of<GUARDED>(c * logq);
    const V mixed = kdk_power_of<GUARDED>(a * logp + b * logq);
    value = (of_p - mixed) * over_p + (of_q - mixed) * over_q;
    score = (of_q - mixed) * over_a;
    if constexpr (GUARDED) return;
    const V infinite = zero + HUGE_VALF;
    value = kdk_where((of_p == infinite) | (of_q == infinite) | (mixed == infinite), infinite, value);
    score = kdk_where((of_q == infinite) & (mixed == infinite), (logq - logp) * kHuge, score);
    // Exactly, where rounding would leave something; and where neither model can give an outcome.
    const auto same = logp == logq;
    value = kdk_where(same, zero, value);
    score = kdk_where(same, zero, score);
  }
};

// How many terms of the series below are exact to the last bits of V.
template <class V>
struct SeriesTerms {
  static constexpr int of_difference = 11, of_second = 9;
};
template <>
struct SeriesTerms<double> {
  static constexpr int of_difference = 19, of_second = 16;
};

// Any other a and b: differences of exponentials by expm1, and by a series where all three are near.
struct AlphaBetaNear : OfAlphaBeta {
  // |e^y - e^x| / gap with x and y apart by gap |d|, from the larger exponential.
  template <class V>
  KDK_HD static V difference(V larger, V gap, V size) {
    const V zero = V{}, one = zero + 1.0f, apart = gap * size;
    const auto close = apart < one;
    const V x = kdk_where(close, apart, zero);
    // (1 - e^-x) / x.
    V series = zero + 1.0f;
    for (int n = SeriesTerms<V>::of_difference; n > 1; --n) series = one - series * x * (one / (zero + float(n)));
    const V near = kdk_where(larger > zero, larger * series * size, zero);
    const V far = larger * (one - kdk_exp(-apart)) / kdk_where(gap > zero, gap, one);
    return kdk_where(close | (gap == zero), near, far);
  }
  template <class V>
  KDK_HD static void in_order(V& low, V& high, V& e_low, V& e_high) {
    const auto swap = low > high;
    const V k = low, e = e_low;
    low = kdk_where(swap, high, k), high = kdk_where(swap, k, high);
    e_low = kdk_where(swap, e_high, e), e_high = kdk_where(swap, e, e_high);
  }
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    of_difference(k, p, logp, q, logq, kdk_where(logp == logq, V{}, logp - logq), value, score);
  }
  // d: log p - log q.
  template <class V>
  KDK_HD static void of_difference(const Params<V>& k, V p, V logp, V q, V logq, V d, V& value, V& score) {
    const V a = k.x0, b = k.x1, zero = V{}, one = zero + 1.0f;
    // A power of 0 of a probability of 0 is 1.
    const auto times = [&](V factor, V logarithm) { return kdk_where(factor == zero, zero, factor * logarithm); };
    V k0 = zero, k1 = a, k2 = a + b;
    V e0 = kdk_exp(times(k2, logq)), e1 = kdk_exp(times(a, logp) + times(b, logq)), e2 = kdk_exp(times(k2, logp));
    const V size = kdk_where(d < zero, -d, d);
    const auto larger = [](V x, V y) { return kdk_where(x > y, x, y); };
    const auto signed_as_d = [&](V x) { return kdk_where(d < zero, -x, x); };
    score = -signed_as_d(difference(larger(e0, e1), kdk_where(a < zero, -a, a), size));
    const V e_q = e0, y = a * d, z = k2 * d;
    in_order(k0, k1, e0, e1);
    in_order(k1, k2, e1, e2);
    in_order(k0, k1, e0, e1);
    const V spread = k2 - k0;
    const auto close = spread * size < zero + 0.5f;
    const V rise = signed_as_d(difference(larger(e1, e2), k2 - k1, size) - difference(larger(e0, e1), k1 - k0, size));
    // sum of h_n(y, z) / (n + 2)!, h the sum of all products of n factors y or z.
    V sum = zero + 0.5f, h = one, power = one, inverse = zero + 0.5f;
    const V near_y = kdk_where(close, y, zero), near_z = kdk_where(close, z, zero);
    for (int n = 1; n < SeriesTerms<V>::of_second; ++n) {
      power = power * near_y;
      h = h * near_z + power;
      inverse = inverse * (one / (zero + float(n + 2)));
      sum = sum + h * inverse;
    }
    const auto dead = kdk_dead(p, logp, q, logq);
    const V infinite = zero + HUGE_VALF;
    value = kdk_where(close, kdk_where(size > zero, e_q * sum * d * d, zero), rise / kdk_where(close, one, spread));
    value = kdk_where((e0 == infinite) | (e1 == infinite) | (e2 == infinite), infinite, value);
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit a = 0: (q^b log(q^b / p^b) - q^b + p^b) / b^2.
struct AlphaBetaZeroA : OfAlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V b = k.x1, zero = V{};
    const V q_b = kdk_exp(b * logq), p_b = kdk_exp(b * logp);
    const auto dead = kdk_dead(p, logp, q, logq);
    score = kdk_where(q_b > zero, q_b * (logq - logp), zero);
    value = (b * score - q_b + p_b) / (b * b);
    const V infinite = zero + HUGE_VALF;
    value = kdk_where((q_b == infinite) | (p_b == infinite), infinite, value);
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit b = 0: (p^a log(p^a / q^a) - p^a + q^a) / a^2.
struct AlphaBetaZeroB : OfAlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, zero = V{};
    const V q_a = kdk_exp(a * logq), p_a = kdk_exp(a * logp);
    const auto dead = kdk_dead(p, logp, q, logq);
    value = (kdk_where(p_a > zero, p_a * (a * (logp - logq)), zero) - p_a + q_a) / (a * a);
    const V infinite = zero + HUGE_VALF;
    value = kdk_where((q_a == infinite) | (p_a == infinite), infinite, value);
    score = kdk_where((q_a == infinite) & (p_a == infinite), (logq - logp) * kHuge, (q_a - p_a) / a);
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, score);
  }
};

// The limit a + b = 0: ((p/q)^a - a log(p/q) - 1) / a^2.
struct AlphaBetaZeroSum : OfAlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>& k, V p, V logp, V q, V logq, V& value, V& score) {
    const V a = k.x0, zero = V{};
    const auto dead = kdk_dead(p, logp, q, logq);
    const V log_ratio = a * (logp - logq);
    const V ratio = kdk_exp(log_ratio);
    value = kdk_where(ratio == zero + HUGE_VALF, ratio, (ratio - log_ratio - 1.0f) / (a * a));
    value = kdk_where(dead, zero, value);
    score = kdk_where(dead, zero, (zero + 1.0f - ratio) / a);
  }
};

// The limit a = b = 0: (log p - log q)^2 / 2.
struct AlphaBetaZero : OfAlphaBeta {
  template <bool GUARDED = false, class V>
  KDK_HD static void eval(const Params<V>&, V p, V logp, V q, V logq, V& value, V& score) {
    const V zero = V{};
    const auto dead = kdk_dead(p, logp, q, logq);
    score = kdk_where(dead, zero, logq - logp);
    value = 0.5f * score * score;
  }
};

}  // namespace kdk

// The functors, and the names of their entries in divergence_table.h: a new divergence is entered here.
#define KDK_FUNCTORS(ENTER)                   \
  ENTER(Jsd, "jsd")                           \
  ENTER(Tvd, "tvd")                           \
  ENTER(SkewKl, "skew_kl")                    \
  ENTER(SkewReverseKl, "skew_reverse_kl")     \
  ENTER(MixedKl, "mixed_kl")                  \
  ENTER(Triangular, "triangular")             \
  ENTER(AlphaBeta, "alpha_beta")              \
  ENTER(AlphaBetaNear, "alpha_beta/near")     \
  ENTER(AlphaBetaZeroA, "alpha_beta/a=0")     \
  ENTER(AlphaBetaZeroB, "alpha_beta/b=0")     \
  ENTER(AlphaBetaZeroSum, "alpha_beta/a+b=0") \
  ENTER(AlphaBetaZero, "alpha_beta/a=b=0")
