// The gradient of a row: written from the exponentials in its scratch.
#pragma once

#include "affine.h"
#include "row.h"

#include <algorithm>
#include <cmath>

namespace kdk {
inline namespace KDK_ISA {

// A term of the gradient beside the divergence's own: c1 times a power of es, or times an array.
enum class Extra { kNone, kSquare, kCube, kFourth, kArray };
constexpr int power_of(Extra extra) {
  return extra == Extra::kSquare ? 2 : extra == Extra::kCube ? 3 : extra == Extra::kFourth ? 4 : 1;
}

// The gradient es (a + ks (xs - xt) + kst xt) - et b + extra c1 + c0; the middle terms only with logarithms, et only of
// two models.
template <class C>
struct GradientTerms {
  double a = 0, b = 0, c0 = 0, c1 = 0, ks = 0, kst = 0;
  Extra extra = Extra::kNone;
  bool logs = false, two_models = true;
  Affine<C> as{}, at{};
  C *es = nullptr, *et = nullptr, *array = nullptr;
  // Where it is wanted and et still holds the teacher's exponentials: sum min(es, et ratio) is added up on the way.
  double* accepted = nullptr;
  double ratio = 0;
};

// One form of a gradient, known when it is compiled.
template <bool LOGS, Extra EXTRA, bool ACCEPTED, bool TWO>
struct GradientForm {
  static constexpr bool kLogs = LOGS, kAccepted = ACCEPTED, kTwo = TWO;
  static constexpr Extra kExtra = EXTRA;
  static constexpr bool kArray = EXTRA == Extra::kArray;
  static constexpr int kPower = power_of(EXTRA);
};

// Calls visit(GradientForm) with the form that terms have. All forms that exist stand here: one model has no logarithms
// and no acceptance rate, and logarithms come with powers in an array.
template <bool LOGS, bool ACCEPTED, bool TWO, class Visit>
KDK_INLINE auto visit_extra(Extra extra, Visit visit) {
  if constexpr (TWO && !LOGS) {
    switch (extra) {
      case Extra::kSquare: return visit(GradientForm<LOGS, Extra::kSquare, ACCEPTED, TWO>());
      case Extra::kCube: return visit(GradientForm<LOGS, Extra::kCube, ACCEPTED, TWO>());
      case Extra::kFourth: return visit(GradientForm<LOGS, Extra::kFourth, ACCEPTED, TWO>());
      default: break;
    }
  }
  if (extra == Extra::kArray) return visit(GradientForm<LOGS, Extra::kArray, ACCEPTED, TWO>());
  return visit(GradientForm<LOGS, Extra::kNone, ACCEPTED, TWO>());
}
template <class C, class Visit>
KDK_INLINE auto visit_form(const GradientTerms<C>& terms, Visit visit) {
  if (!terms.two_models) return visit_extra<false, false, false>(terms.extra, visit);
  if (terms.accepted != nullptr) {
    return terms.logs ? visit_extra<true, true, true>(terms.extra, visit)
                      : visit_extra<false, true, true>(terms.extra, visit);
  }
  return terms.logs ? visit_extra<true, false, true>(terms.extra, visit)
                    : visit_extra<false, false, true>(terms.extra, visit);
}

template <int POWER, class V>
KDK_INLINE V power(V e) {
  if (POWER == 4) return (e * e) * (e * e);
  return POWER == 3 ? e * e * e : POWER == 2 ? e * e : e;
}

// Two vectors of a gradient, from where their exponentials and logits stand.
template <class Form, class X>
struct GradientBlock {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  C a, b, c0, c1, ks, kst, ratio;
  Affine<C> as, at;

  explicit GradientBlock(const GradientTerms<C>& k)
      : a(C(k.a)),
        b(C(k.b)),
        c0(C(k.c0)),
        c1(C(k.c1)),
        ks(C(k.ks)),
        kst(C(k.kst)),
        ratio(C(k.ratio)),
        as(k.as),
        at(k.at) {}

  template <class Y = X>
  KDK_INLINE void operator()(const C* es, const C* et, const C* array, const X* s, const Y* t, V& accepted, V& g0,
                             V& g1) const {
    const V zero = {};
    const V es0 = load<V>(es), es1 = load<V>(es + kLanes<C>);
    if (Form::kLogs) {
      V s0, s1, t0, t1;
      Io<X>::load2(s, s0, s1);
      load2_as<X>(t, t0, t1);
      const V xs0 = as(s0), xs1 = as(s1), xt0 = at(t0), xt1 = at(t1);
      g0 = c0 + es0 * keep(es0 != zero, a + ks * (xs0 - xt0) + kst * xt0);
      g1 = c0 + es1 * keep(es1 != zero, a + ks * (xs1 - xt1) + kst * xt1);
    } else if (Form::kPower > 1) {
      g0 = c0 + es0 * (a + power<Form::kPower - 1>(es0) * c1);
      g1 = c0 + es1 * (a + power<Form::kPower - 1>(es1) * c1);
    } else {
      g0 = c0 + es0 * a;
      g1 = c0 + es1 * a;
    }
    if (Form::kTwo) {
      const V et0 = load<V>(et), et1 = load<V>(et + kLanes<C>);
      g0 -= unfused(et0 * b);
      g1 -= unfused(et1 * b);
      if (Form::kAccepted) accepted += min_of(es0, et0 * ratio) + min_of(es1, et1 * ratio);
    }
    if (Form::kArray) {
      g0 += load<V>(array) * c1;
      g1 += load<V>(array + kLanes<C>) * c1;
    }
  }
};

// The blocks at out that may be streamed around the caches: whole cache lines, for one that is half streamed and half
// stored costs a read.
template <class X>
KDK_INLINE Range streamed_blocks(const X* out, int64_t blocks) {
  constexpr int64_t bytes = Io<X>::kBlock * int64_t(sizeof(X));
  const auto in_line = [](const X* x) { return int64_t(reinterpret_cast<uintptr_t>(x) % kLineBytes); };
  return {(kLineBytes - in_line(out)) % kLineBytes / bytes, blocks - in_line(out + blocks * Io<X>::kBlock) / bytes};
}

// Writes the blocks of a piece of a row, one after the other; out is where the row begins.
template <bool STREAM, class X, class Lanes>
struct BlockWriter {
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using V = Vec<typename Io<X>::C>;
  X* to;
  Range streamed = {0, 0};
  const Lanes lanes;

  KDK_INLINE BlockWriter(X* out, int64_t first, int64_t blocks, const Lanes& counting) : lanes(counting) {
    if constexpr (Lanes::kEdge) {
      to = out + (first + lanes.begin);
    } else {
      to = out + first;
      if (STREAM) streamed = streamed_blocks(to, blocks);
    }
  }
  // Block i of the piece.
  KDK_INLINE void put(int64_t i, V a, V b) {
    if constexpr (Lanes::kEdge) {
      alignas(64) X block[kBlock];
      Io<X>::template store2<false>(block, a, b);
      std::copy(block + lanes.begin, block + lanes.end, to);
    } else if (STREAM && i >= streamed.begin && i < streamed.end) {
      Io<X>::template store2<true>(to, a, b);
    } else {
      Io<X>::template store2<false>(to, a, b);
    }
    to += kBlock;
  }
};

template <class Form, bool STREAM, class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, X* out) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const GradientBlock<Form, X> gradient(k);
  // Backwards: of a row whose exponentials do not all fit the cache, the last are still there.
  for (int64_t tile = row.tiles() - 1; tile >= 0; --tile) {
    V accepted = {};
    row.pieces(tile,
               [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t first, auto lanes) KDK_LAMBDA_INLINE {
                 BlockWriter<STREAM, X, decltype(lanes)> writer(out, first, blocks, lanes);
                 V local_accepted = accepted;
                 const auto local_gradient = gradient;
                 const C *es_in = k.es + slot, *et_in = k.et + slot, *array_in = k.array + slot;
                 for (int64_t i = 0; i < blocks; ++i, es_in += block, et_in += block, array_in += block) {
                   V g0, g1;
                   local_gradient(es_in, et_in, array_in, s + i * block, t + i * block, local_accepted, g0, g1);
                   writer.put(i, g0, g1);
                 }
                 accepted = local_accepted;
               });
    if (Form::kAccepted) *k.accepted += horizontal_sum<C>(accepted);
  }
}
template <class X, class Y>
void write_gradient(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& terms, X* out, bool streamed) {
  visit_form(terms, [&](auto form) {
    using Form = decltype(form);
    streamed ? write_gradient<Form, true>(row, terms, out) : write_gradient<Form, false>(row, terms, out);
  });
}

// Makes g the gradient of the element at slot, by the numbers that stand for it in the scratch; false, and nothing
// done, where that leaves the range. Stored when the row is written, an element brings a line back that was just
// streamed to memory, and all that are stored after it wait for that.
template <class C>
bool set_gradient(const GradientTerms<C>& k, int64_t slot, double g) {
  const double x = g - k.c0;
  const auto within = [&](double factor) { return std::abs(factor) > 1e-30 && std::abs(x) < 1e30 * std::abs(factor); };
  const bool by_teacher = k.two_models && within(k.b);
  if (k.logs || k.accepted != nullptr || !(by_teacher || (power_of(k.extra) == 1 && within(k.a)))) return false;
  k.es[slot] = by_teacher ? C(0) : C(x / k.a);
  if (k.two_models) k.et[slot] = by_teacher ? C(-x / k.b) : C(0);
  if (k.extra == Extra::kArray) k.array[slot] = C(0);
  return true;
}

// The same formula for element j alone, less the label's part of cross entropy.
template <class X, class Y>
double gradient_at(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& k, int64_t j, double xs, double xt) {
  const int64_t slot = row.slot(j);
  const double es = k.es[slot];
  double g = k.c0 + es * k.a;
  if (k.two_models) g -= double(k.et[slot]) * k.b;
  if (k.logs && es != 0) g += es * (k.ks * (xs - xt) + k.kst * xt);
  if (power_of(k.extra) > 1) g += std::pow(es, power_of(k.extra)) * k.c1;
  if (k.extra == Extra::kArray) g += double(k.array[slot]) * k.c1;
  return g;
}

}  // namespace KDK_ISA
}  // namespace kdk
