// The divergences by their index, without what any pattern makes of them.
#pragma once

#include "math.h"

#include <kdkernels/divergences.h>

#define KDK_WITH_OUTER

#include <cstring>

namespace kdk {

template <>
struct SeriesTerms<VecD> : SeriesTerms<double> {};
template <>
struct SeriesTerms<Pair<Pair<VecD>>> : SeriesTerms<double> {};

inline namespace KDK_ISA {

// An entry of divergence_table.h as any pattern can take it: the functor, or the coefficients.
template <class F>
struct General {
  const char* name;
};
struct OfLogs {
  const char* name;
  Linear coefficients;
};
template <class F>
constexpr General<F> general(const char* name) {
  return {name};
}
constexpr OfLogs linear(const char* name, Linear c) { return {name, c}; }

struct Divergence {
  const char* name;
  bool linear;
  Linear coefficients;
  Outer outer = Outer::kNone;
  template <class F>
  constexpr Divergence(General<F> entry) : name(entry.name), linear(false), coefficients{}, outer(OuterOf<F>::value) {}
  constexpr Divergence(OfLogs entry) : name(entry.name), linear(true), coefficients(entry.coefficients) {}
};

#include "kdkernels/divergence_table.h"

// True where the gradient has terms in q log p or q log q.
inline bool has_logs(const Divergence& divergence) {
  return divergence.linear && (divergence.coefficients.c_qp != 0 || divergence.coefficients.c_qq != 0);
}

}  // namespace KDK_ISA
}  // namespace kdk
