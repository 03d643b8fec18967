// Logits of one side scaled to base 2 and relative to a reference: x = logit / (T ln 2) - r. z denotes the sum of 2^x,
// and p = 2^x / z, here and in all that follows.
#pragma once

#include "math.h"

#include <cmath>
#include <limits>

namespace kdk {
inline namespace KDK_ISA {

// (x - m) * c - r: x * c relative to a reference m c + r, of which one part is 0. Where the machine has fused
// multiply-adds the reference is an integer r and m is 0. Without them, of numbers that no float tells from the next
// integer, and in double, the reference is the raw m: x - m then has one rounding, relative to itself.
KDK_INLINE VecF relative(VecF x, float c, float r, float m) { return (x - m) * c - r; }
KDK_INLINE VecD relative(VecD x, double c, double, double m) { return (x - m) * c; }

// Scale and reference of one side; see relative().
template <class C>
struct Affine {
  C c, r, m;
  KDK_INLINE Vec<C> operator()(Vec<C> x) const { return relative(x, c, r, m); }
  double reference() const { return double(m) * double(c) + double(r); }
  // The logit that all are relative to.
  double logit() const { return double(m) + double(r) / double(c); }
  double scalar(double x) const { return (x - double(m)) * double(c) - double(r); }
  // Scale and bias for exp2_of_logit.
  float scale() const { return float(c) * kUnit; }
  float bias() const { return 2.0f + float(127 - reference()) * kUnit; }
  // logit * scale, a rounding of logit c ln 2, less log 2^x / z. The rounding is compensated at the reference, where
  // most of the mass is; elsewhere it would set log p against p, 1.3e-8 for every unit of a logit.
  double log_normalizer(double log2_z, C scale) const {
    return kLn2 * (reference() + log2_z) + (double(scale) - kLn2 * double(c)) * logit();
  }
  // A logit whose exponential is exactly 0, without leaving the bounds of exp2_of_logit.
  float masked_logit() const { return float((reference() - 127) / double(c)); }
  // Differences of logits that are this small lose nothing to rounding, whatever they stand for.
  bool in_exp_range(const Affine& other) const {
    return std::abs(reference()) <= 126 && std::abs(other.reference()) <= 126 &&
           std::abs(reference() - other.reference()) <= 32;
  }
};

template <class C>
Affine<C> affine(double c, double maximum) {
  constexpr C largest = std::numeric_limits<C>::max();
  const C cc = C(c);
  // A row that starts with -inf gets a finite reference, from which its first tile forces a new one.
  const C m = C(std::max(maximum, -double(largest)));
  const double whole = std::nearbyint(double(m) * double(cc));
  if (kFused && sizeof(C) == 4 && std::abs(whole) < 0x1p24) return {cc, C(whole), C(0)};
  return {cc, C(0), m};
}

}  // namespace KDK_ISA
}  // namespace kdk
