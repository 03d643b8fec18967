// Values and scores of outcomes, in double for the entries and in the type of the sums for all others.
#pragma once

#include "divergence_list.h"
#include "entries.h"
#include "math.h"

namespace kdk {
inline namespace KDK_ISA {

namespace topk {

// Values and scores of n outcomes; the teacher's step is 0 where one p serves all. Reads and writes whole vectors.
template <class C>
using Evaluate = void (*)(const Linear&, double x0, double x1, const C* p, const C* logp, int64_t step, const C* q,
                          const C* logq, C* value, C* score, int64_t n);

// The divergences that are linear in the log-probabilities, as a functor with run-time coefficients.
struct LinearTerms {
  template <class V, class C>
  KDK_INLINE static V log_terms(C c_p, C c_q, V logp, V logq) {
    // A coefficient of 0 silences an infinite logarithm.
    V sum = {};
    if (c_p != 0) sum = c_p * logp;
    if (c_q != 0) sum = sum + c_q * logq;
    return sum;
  }
  template <class C>
  KDK_INLINE static void eval(const Linear& k, Vec<C> p, Vec<C> logp, Vec<C> q, Vec<C> logq, Vec<C>& value,
                              Vec<C>& score) {
    using V = Vec<C>;
    const V zero = {};
    const V over_p = kdk_where(p > zero, p * log_terms<V, C>(C(k.c_pp), C(k.c_pq), logp, logq), zero);
    const V over_q = kdk_where(q > zero, q * log_terms<V, C>(C(k.c_qp), C(k.c_qq), logp, logq), zero);
    value = over_p + over_q;
    score = C(k.c_pq) * p + C(k.c_qq) * q + over_q;
  }
};

template <class F, class C>
void evaluate(const Linear& linear, double x0, double x1, const C* p, const C* logp, int64_t step, const C* q,
              const C* logq, C* value, C* score, int64_t n) {
  using V = Vec<C>;
  const Params<V> params{V{} + C(x0), V{} + C(x1), V{} + C(1 - x0)};
  (void)linear, (void)params;
  for (int64_t j = 0; j < n; j += kLanes<C>) {
    const V vp = step ? load<V>(p + j) : V{} + *p, vlogp = step ? load<V>(logp + j) : V{} + *logp;
    const V vq = load<V>(q + j), vlogq = load<V>(logq + j);
    V vvalue, vscore;
    if constexpr (std::is_same_v<F, LinearTerms>) {
      LinearTerms::eval<C>(linear, vp, vlogp, vq, vlogq, vvalue, vscore);
    } else if constexpr (std::is_same_v<F, Jsd>) {
      // By the ratios of probabilities: where the models are near, logarithms would lose most of it.
      F::paired(params, vp, vq, vvalue, vscore);
      vvalue = vvalue + vscore;
    } else {
      F::eval(params, vp, vlogp, vq, vlogq, vvalue, vscore);
    }
    store(value + j, vvalue);
    store(score + j, vscore);
  }
}

struct Divergence {
  const char* name;
  Linear coefficients;
  Evaluate<float> f32;
  Evaluate<double> f64;
  // Where p = 0.
  Evaluate<float> without_teacher_f32;
  Evaluate<double> without_teacher_f64;
  bool linear_without_teacher;
  auto in(float) const { return f32; }
  auto in(double) const { return f64; }
  auto without_teacher_in(float) const { return without_teacher_f32; }
  auto without_teacher_in(double) const { return without_teacher_f64; }
};
// The limits of alpha-beta divergences cancel in fp32 where the form for all parameters does not.
template <class F>
using InFloat = std::conditional_t<std::is_same_v<F, AlphaBetaZeroA> || std::is_same_v<F, AlphaBetaZeroB> ||
                                       std::is_same_v<F, AlphaBetaZeroSum>,
                                   AlphaBetaNear, F>;
template <class F>
constexpr Divergence general(const char* name) {
  using None = typename WithoutTeacher<F>::Functor;
  return {name,
          {},
          evaluate<InFloat<F>, float>,
          evaluate<F, double>,
          evaluate<None, float>,
          evaluate<None, double>,
          LinearWithoutTeacher<F>::value};
}
constexpr Divergence linear(const char* name, Linear c) {
  constexpr auto f32 = evaluate<LinearTerms, float>;
  constexpr auto f64 = evaluate<LinearTerms, double>;
  return {name, c, f32, f64, f32, f64, true};
}

// The same table as the dense kernels', and so the same indices.
#include "kdkernels/divergence_table.h"

// Calls visit(slot) for the slots of a row that hold no element.
template <class X, class Visit>
void for_padding(const Row<X>& row, Visit visit) {
  constexpr int64_t block = Row<X>::kBlock;
  if (row.head > 0)
    for (int64_t j = row.head; j < block; ++j) visit(Io<X>::slot(j));
  if (row.tail > 0)
    for (int64_t j = 0; j < block - row.tail; ++j) visit(row.slots() - block + Io<X>::slot(j));
}

// Values and scores of the outcomes outside the entries, all with the teacher's probability p; returns their sums. The
// scores replace x.
template <class X>
void evaluate_outside(const Row<X>& row, Evaluate<typename Io<X>::C> function, const Linear& linear, double x0,
                      double x1, double p, double logp, double iq, double log_z, const Entries& entries,
                      const typename Io<X>::C* es, typename Io<X>::C* xs, typename Io<X>::C* values, double& value,
                      double& score) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t piece = 512;
  alignas(64) C q[piece], logq[piece];
  const C cp = C(p), clogp = C(logp), scale = C(iq), ln2 = C(kLn2), clog_z = C(log_z);
  const int64_t slots = row.slots();
  for (int64_t begin = 0; begin < slots; begin += piece) {
    const int64_t count = std::min(piece, slots - begin);
    for (int64_t j = 0; j < count; j += kLanes<C>) {
      store(q + j, load<V>(es + begin + j) * scale);
      store(logq + j, load<V>(xs + begin + j) * ln2 - clog_z);
    }
    function(linear, x0, x1, &cp, &clogp, 0, q, logq, values + begin, xs + begin, count);
  }
  const auto silence = [&](int64_t slot) { values[slot] = xs[slot] = C(0); };
  for (int64_t k = 0; k < entries.count; ++k) silence(entries.slots[size_t(k)]);
  for_padding(row, silence);
  value = sum_of(values, slots);
  score = sum_of(xs, slots);
}

// The values outside the entries, in double: of a row with logits that are too far apart for C.
template <class X>
double values_outside(const X* s, int64_t n, Evaluate<double> function, const Linear& linear, double x0, double x1,
                      double p, double logp, const Affine<typename Io<X>::C>& a, double log_z, const Entries& entries) {
  constexpr int64_t piece = 512;
  alignas(64) double q[piece], logq[piece] = {}, value[piece], score[piece];
  const double scale = kLn2 * double(a.c), m = double(a.m), shift = kLn2 * double(a.r) + log_z;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += piece) {
    const int64_t count = std::min(piece, n - begin);
    for (int64_t j = 0; j < count; ++j) logq[j] = (double(to_compute(s[begin + j])) - m) * scale - shift;
    Entries::exponentials(logq, q, count);
    function(linear, x0, x1, &p, &logp, 0, q, logq, value, score, count);
    for (int64_t k = 0; k < entries.count; ++k) {
      const int64_t at = entries.ids[size_t(k)] - begin;
      if (at >= 0 && at < count) value[at] = 0;
    }
    total += sum_of_doubles(value, count);
  }
  return total;
}

}  // namespace topk

}  // namespace KDK_ISA
}  // namespace kdk
