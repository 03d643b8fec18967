// Elementary functions of vectors, and of pairs of them for the divergences' functors: powers of two, exponentials,
// logarithms, inverses, tanh.
#pragma once

#include "pair.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace kdk {
inline namespace KDK_ISA {

constexpr double kLn2 = 0.6931471805599453;
constexpr double kLog2e = 1.4426950408889634;

// Bounds of x in which exp2_fast works: 2^-127 counts as 0, 2^128 as inf. NaN passes.
KDK_INLINE VecF clamp_exponent(VecF x) { return min_of(VecF{} + 128.0f, max_keep_nan(VecF{} - 127.0f, x)); }
KDK_INLINE VecD clamp_exponent(VecD x) {
  // Doubles go to the library's exp2, which needs no bounds; a finite one keeps 0 * x at 0.
  return max_keep_nan(VecD{} - 2000.0, x);
}

// The polynomial of 2^f = 1 + f Q(f) for f in [-1/2, 1/2] / 2^STEPS_LOG2, minimax in the relative error of 2^f, whose
// mean is 0. A mean other than 0 comes back as it is in the divergences that set p against log p: JSD was off by 3e-7
// with the best 2^f for the maximum alone. f comes divided by 2^UNIT_LOG2, and so Q multiplied by it.
template <int DEGREE, int STEPS_LOG2>
struct Exp2Slope;
template <>
struct Exp2Slope<5, 0> {  // 1.2e-7
  static constexpr float at[] = {0.6931466460227966f, 0.2402230054140091f, 0.05551067739725113f, 0.00966887641698122f,
                                 0.0013179666129872203f};
};
template <>
struct Exp2Slope<4, 0> {  // 3.0e-6
  static constexpr float at[] = {0.6931210160255432f, 0.24022895097732544f, 0.05591738969087601f, 0.00962985958904028f};
};
template <>
struct Exp2Slope<3, 3> {  // 6e-8
  static constexpr float at[] = {0.6931472420692444f, 0.24024905264377594f, 0.0554962232708931f};
};
template <>
struct Exp2Slope<2, 3> {  // 3.6e-6
  static constexpr float at[] = {0.6933088898658752f, 0.2402709424495697f};
};
template <>
struct Exp2Slope<3, 4> {  // 4e-9
  static constexpr float at[] = {0.6931471824645996f, 0.24023213982582092f, 0.055502135306596756f};
};
template <>
struct Exp2Slope<2, 4> {  // 4.4e-7
  static constexpr float at[] = {0.6931877136230469f, 0.24023769795894623f};
};

constexpr float power_of_two(int n) { return n == 0 ? 1.0f : 2.0f * power_of_two(n - 1); }

template <int DEGREE, int STEPS_LOG2, int UNIT_LOG2, size_t... K, int COUNT>
KDK_INLINE void exp2_slopes(std::index_sequence<K...>, const VecF (&f)[COUNT], VecF (&slope)[COUNT]) {
  const VecF zero = {};
  static const VecF c[] = {zero + Exp2Slope<DEGREE, STEPS_LOG2>::at[K] * power_of_two(UNIT_LOG2 * int(K + 1))...};
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) slope[i] = c[DEGREE - 1];
#pragma GCC unroll 4
  for (int k = DEGREE - 2; k >= 0; --k)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) slope[i] = plus_in_memory(slope[i], f[i], c[k]);
}
template <int DEGREE, int STEPS_LOG2, int UNIT_LOG2, int COUNT>
KDK_INLINE void exp2_slopes(const VecF (&f)[COUNT], VecF (&slope)[COUNT]) {
  exp2_slopes<DEGREE, STEPS_LOG2, UNIT_LOG2>(std::make_index_sequence<DEGREE>(), f, slope);
}

// 1.5 * 2^23, to which adding rounds to an integer, and the exponent's bias.
constexpr float kRoundingBias = 12582912.0f + 127.0f;

// 2^x for x in [-127, 128]; exactly 0 at -127, so also for a clamped -inf. NaN stays NaN because the exponent is
// applied by a multiplication.
template <int DEGREE>
KDK_INLINE VecF exp2_fast(VecF x) {
  const VecF shifted = x + kRoundingBias;
  const VecF f[] = {x - (shifted - kRoundingBias)};
  VecF slope[1];
  exp2_slopes<DEGREE, 0, 0>(f, slope);
  return (slope[0] * f[0] + 1.0f) * bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
}
template <int DEGREE>
KDK_INLINE VecD exp2_fast(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

// Natural exponential for the functors; inf from 2^128 on.
KDK_INLINE VecF kdk_exp(VecF x) { return exp2_fast<5>(clamp_exponent(x * 1.4426950408889634f)); }
// 2^x to 3e-6.
KDK_INLINE VecF kdk_exp2_coarse(VecF x) { return exp2_fast<4>(clamp_exponent(x)); }
KDK_INLINE VecD kdk_exp(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// e^x in double to about 1 ulp: x = n log 2 + r, Taylor to r^13 on |r| < 0.35. 0 below the normal range.
KDK_INLINE VecD exp_double(VecD x) {
  const VecD zero = {};
  const VecD lowest = zero - 708.0, highest = zero + 709.0;
  const VecD c = kdk_where(x < lowest, lowest, kdk_where(x > highest, highest, x));
  const double magic = 6755399441055744.0 + 1023.0;  // 1.5 * 2^52: adding it rounds to an integer; 1023: the bias
  const VecD shifted = c * kLog2e + magic;
  const VecD n = shifted - magic;
  const VecD r = (c - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  constexpr double inverse_factorials[] = {1.6059043836821613e-10,
                                           2.0876756987868099e-09,
                                           2.5052108385441720e-08,
                                           2.7557319223985893e-07,
                                           2.7557319223985888e-06,
                                           2.4801587301587302e-05,
                                           1.9841269841269841e-04,
                                           1.3888888888888889e-03,
                                           8.3333333333333332e-03,
                                           4.1666666666666664e-02,
                                           1.6666666666666666e-01,
                                           0.5,
                                           1.0,
                                           1.0};
  VecD poly = zero + inverse_factorials[0];
  for (int i = 1; i < 14; ++i) poly = poly * r + inverse_factorials[i];
  const VecD y = poly * bit_cast<VecD>(bit_cast<VecL>(shifted) << 52);
  return kdk_where(x < lowest, zero, y);
}

// Exponentials straight from logits, with no x = logit c - r between: three instructions reduce a logit where x and its
// reduction take four, and one watches the bounds where clamping takes two. Needs fused multiply-adds and an integer r.
//
// With N steps of an octave, adding bias = 2 + (127 - r) N 2^-22 to logit c N 2^-22 rounds x N to an integer n, for the
// spacing of floats in [2, 4) is 2^-22, and leaves 127 N + n in the low bits. As long as it is in [0, 256 N) the other
// bits are those of 2; of the numbers that have no others set only 0 is not among these, and there the exponential
// comes out as 0, as it should. Exponentials below 2^-126 are anything below it, those from 2^127.5 on inf or NaN.
//
// A step's power 2^(i / N) comes from a table that one permutation picks from: the polynomial loses two degrees by it,
// of which each is a fused multiply-add. As bits less those of 1 and of i / N added to the exponent.
template <int STEPS_LOG2>
struct StepPowers;
template <>
struct StepPowers<4> {
  alignas(64) static constexpr int32_t at[] = {0,       -152893, -289342, -408621, -509968, -592590, -655657, -698305,
                                               -719629, -718684, -694486, -646004, -572163, -471841, -343865, -187011};
};
template <>
struct StepPowers<3> {
  alignas(32) static constexpr int32_t at[] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};
};
template <>
struct StepPowers<0> {
  alignas(16) static constexpr int32_t at[kLanes<float>] = {};
};
constexpr int kStepsLog2 = kPickedLog2;
constexpr int kUnitLog2 = 22 - kStepsLog2;
constexpr float kUnit = 1.0f / float(1 << kUnitLog2);
KDK_INLINE VecI step_powers(VecI places) { return pick(load<VecI>(StepPowers<kStepsLog2>::at), places); }

struct Bounds {
  VecI seen = {};
  // True where every x was in [-127, 128]; NaN is not.
  bool kept() const { return !any(seen & ~(((256 << kStepsLog2) - 1) | bit_cast<int32_t>(2.0f))); }
};
// Of several vectors step by step (see Pair): two make the sparse sweep 2 to 3 % faster, four run out of AVX2's
// registers, and gain nothing with AVX-512. ACCURACY is the degree of the polynomial with no steps.
template <int ACCURACY, int COUNT>
KDK_INLINE void exp2_of_logits(VecF (&v)[COUNT], float scale, float bias, Bounds& bounds) {
  VecF power[COUNT], f[COUNT], slope[COUNT];
  constexpr int degree = kStepsLog2 > 0 ? ACCURACY - 2 : ACCURACY;
#define KDK_EACH _Pragma("GCC unroll 4") for (int i = 0; i < COUNT; ++i)
  KDK_EACH power[i] = v[i] * scale + bias;
  KDK_EACH bounds.seen |= bit_cast<VecI>(power[i]);
  KDK_EACH f[i] = v[i] * scale + (bias - power[i]);
  KDK_EACH {
    const VecI places = bit_cast<VecI>(power[i]);
    power[i] = bit_cast<VecF>((places << (23 - kStepsLog2)) + step_powers(places));
  }
  exp2_slopes<degree, kStepsLog2, kUnitLog2>(f, slope);
  // 2^n + (2^n f) Q: the product by 2^n is done while Q is worked out. It costs no instruction more and three cycles
  // less on the way from a logit to its exponential, which is what the loop waits for.
  KDK_EACH f[i] *= power[i];
  KDK_EACH v[i] = slope[i] * f[i] + power[i];
#undef KDK_EACH
}
template <int ACCURACY>
KDK_INLINE VecF exp2_of_logit(VecF logit, float scale, float bias, Bounds& bounds) {
  VecF v[] = {logit};
  exp2_of_logits<ACCURACY>(v, scale, bias, bounds);
  return v[0];
}

// Natural logarithms.
// The steps of a logarithm that arithmetic cannot say: the exponent in units of 2^-23, and the mantissa in [sqrt(1/2),
// sqrt(2)).
constexpr int32_t kLowestMantissa = 0x3f3504f3;
KDK_INLINE VecI exponent_of(VecF x) { return (bit_cast<VecI>(x) - kLowestMantissa) & int32_t(0xff800000); }
KDK_INLINE VecF mantissa_of(VecF x, VecI exponent) { return bit_cast<VecF>(bit_cast<VecI>(x) - exponent); }
KDK_INLINE VecF to_float(VecI x) { return __builtin_convertvector(x, VecF); }
template <class T>
KDK_INLINE auto exponent_of(const Pair<T>& x) {
  return Pair<decltype(exponent_of(x.a))>(exponent_of(x.a), exponent_of(x.b));
}
template <class T, class E>
KDK_INLINE Pair<T> mantissa_of(const Pair<T>& x, const Pair<E>& exponent) {
  return Pair<T>(mantissa_of(x.a, exponent.a), mantissa_of(x.b, exponent.b));
}
template <class E>
KDK_INLINE auto to_float(const Pair<E>& x) {
  return Pair<decltype(to_float(x.a))>(to_float(x.a), to_float(x.b));
}
// Natural logarithm of a finite number >= 0: log(2^e (1 + f)) = e log 2 + f - f^2 / 2 + f^3 P(f), minimax in absolute
// error, 1.4e-8. The first two terms are exact: divergences of near models are made of the second alone. Numbers below
// the normal range, 0 included, give about -88: their factor is 0.
template <class V>
KDK_INLINE V log_of_floats(V x) {
  const auto exponent = exponent_of(x);
  const V f = mantissa_of(x, exponent) - 1.0f;
  V poly = 0.08792100101709366f * f + -0.14368557929992676f;
  poly = poly * f + 0.14929217100143433f;
  poly = poly * f + -0.16564446687698364f;
  poly = poly * f + 0.19960030913352966f;
  poly = poly * f + -0.2500174939632416f;
  poly = poly * f + 0.3333401083946228f;
  return to_float(exponent) * (0.6931471805599453f / (1 << 23)) + (f * f * (poly * f - 0.5f) + f);
}

// With the mantissas in 16 bins, which a permutation looks up: log m = log c + log1p(r), r = m / c - 1 in [-0.03,
// 0.04], and c = 1 where m is next to 1. Two multiplications less than one polynomial for all; 1e-9 before rounding.
constexpr bool kLogByBins = kPickedLog2 == 4;
alignas(64) constexpr float kBinInverse[] = {
    1.3836392164230347f, 1.3262920379638672f, 1.2735093832015991f, 1.2247670888900757f, 1.17961847782135f,
    1.1376800537109375f, 1.0986213684082031f, 1.0621554851531982f, 1.028032660484314f,  1.0f,
    0.9341747760772705f, 0.8826409578323364f, 0.8364956378936768f, 0.7949356436729431f, 0.7573098540306091f,
    0.7230848670005798f};
alignas(64) constexpr float kBinLog[] = {
    -0.32471713423728943f, -0.2823871076107025f,  -0.24177637696266174f, -0.20275069773197174f, -0.16519106924533844f,
    -0.12899114191532135f, -0.09405609220266342f, -0.0603003203868866f,  -0.02764693833887577f, 0.0f,
    0.0680917352437973f,   0.12483678013086319f,  0.17853397130966187f,  0.2294941246509552f,   0.27798280119895935f,
    0.3242286741733551f};
KDK_INLINE VecF log_by_bins(VecF x) {
  const VecI exponent = exponent_of(x), places = (bit_cast<VecI>(x) - kLowestMantissa) >> 19;
  const VecF r = mantissa_of(x, exponent) * pick(load<VecF>(kBinInverse), places) - 1.0f;
  const VecF poly = (-0.24753102660179138f * r + 0.3335205018520355f) * r - 0.5f;
  return to_float(exponent) * (0.6931471805599453f / (1 << 23)) +
         (r * r * poly + r + pick(load<VecF>(kBinLog), places));
}
KDK_INLINE VecF kdk_log(VecF x) { return kLogByBins ? log_by_bins(x) : log_of_floats(x); }
KDK_INLINE VecD kdk_log(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::log(x[i]);
  return y;
}
template <class T>
KDK_INLINE Pair<T> kdk_log(const Pair<T>& x) {
  if constexpr (!kLogByBins && std::is_same_v<T, Pair<VecF>>) {
    return log_of_floats(x);
  } else {
    return Pair<T>(kdk_log(x.a), kdk_log(x.b));
  }
}
// The logarithm of a ratio u of probabilities; of 0 a number. In double it is taken from u - 1 where that is small:
// rows come there because u is next to 1.
template <class V>
KDK_INLINE V kdk_log_ratio(const V& u, const V&) {
  return kdk_log(u);
}
KDK_INLINE VecD kdk_log_ratio(const VecD& u, const VecD& less_one) {
  constexpr double smallest = std::numeric_limits<double>::min();
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i)
    y[i] = std::abs(less_one[i]) < 0.5 ? std::log1p(less_one[i]) : std::log(std::max(u[i], smallest));
  return y;
}
template <class T>
KDK_INLINE Pair<T> kdk_log_ratio(const Pair<T>& u, const Pair<T>& less_one) {
  if constexpr (!kLogByBins && std::is_same_v<T, Pair<VecF>>) {
    return kdk_log(u);
  } else {
    return Pair<T>(kdk_log_ratio(u.a, less_one.a), kdk_log_ratio(u.b, less_one.b));
  }
}

// 1 / x to a rounding, of positive numbers in the normal range: an estimate takes a step of Newton.
KDK_INLINE VecF kdk_inverse(VecF x) {
  const VecF y = inverse_or_estimate(x);
  return kEstimatesInverse ? y + y * (1.0f - x * y) : y;
}
KDK_INLINE VecD kdk_inverse(VecD x) { return 1.0 / x; }

template <class T>
KDK_INLINE Pair<T> kdk_inverse(const Pair<T>& x) {
  return Pair<T>(kdk_inverse(x.a), kdk_inverse(x.b));
}
template <class T>
KDK_INLINE Pair<T> kdk_exp(const Pair<T>& x) {
  return Pair<T>(kdk_exp(x.a), kdk_exp(x.b));
}
template <class T>
KDK_INLINE Pair<T> kdk_exp2_coarse(const Pair<T>& x) {
  return Pair<T>(kdk_exp2_coarse(x.a), kdk_exp2_coarse(x.b));
}

// tanh with a relative error of a few ulp: minimax x + x^3 P(x^2) below 5/8, 1 - 2 / (1 + e^2|x|) above.
KDK_INLINE VecF tanh_fast(VecF x) {
  const VecF zero = {}, magnitude = kdk_where(x < zero, -x, x), square = x * x;
  VecF poly = -0.005704987007f * square + 0.02063908726f;
  poly = poly * square + -0.05373971509f;
  poly = poly * square + 0.133314422f;
  poly = poly * square + -0.3333328194f;
  const VecF small = x + x * square * poly;
  const VecF large = 1.0f - 2.0f / (1.0f + kdk_exp(2.0f * magnitude));
  const VecF signed_large = kdk_where(x < zero, -large, large);
  return kdk_where(magnitude < 0.625f, small, kdk_where(x != x, x, signed_large));
}
KDK_INLINE VecD tanh_fast(VecD x) {
  VecD y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}

}  // namespace KDK_ISA
}  // namespace kdk
