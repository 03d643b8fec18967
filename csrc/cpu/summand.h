// The summands of the divergences and their scores as the textbook has them, one vector after the other: for patterns
// whose rows are not left anything that adds up to nothing.
#pragma once

#include "divergence_list.h"

#include <type_traits>

namespace kdk {
inline namespace KDK_ISA {

template <class F>
struct FunctorSummand {
  static constexpr bool kOfTeacher = false;
  template <class V>
  KDK_INLINE void operator()(const Params<V>& params, V p, V logp, V q, V logq, V& value, V& score) const {
    F::eval(params, p, logp, q, logq, value, score);
  }
};

// p (c_pp logp + c_pq logq) + q (c_qp logp + c_qq logq); terms whose coefficient or weight is 0 may be infinite.
// OF_TEACHER: no term is weighed by q, and the scores of a row add up to c_pq.
template <bool OF_TEACHER>
struct LinearSummand {
  static constexpr bool kOfTeacher = OF_TEACHER;
  Linear k;
  template <class C>
  KDK_INLINE static Vec<C> mixed(C c_p, Vec<C> logp, C c_q, Vec<C> logq) {
    if (c_p == 0) return logq * c_q;
    return c_q == 0 ? logp * c_p : logp * c_p + logq * c_q;
  }
  template <class V>
  KDK_INLINE void operator()(const Params<V>&, V p, V logp, V q, V logq, V& value, V& score) const {
    using C = std::conditional_t<std::is_same_v<V, VecD>, double, float>;
    const V zero = {};
    value = zero;
    score = p * C(k.c_pq);
    if (k.c_pp != 0 || k.c_pq != 0) value = kdk_where(p != zero, p * mixed<C>(C(k.c_pp), logp, C(k.c_pq), logq), zero);
    if constexpr (!OF_TEACHER) {
      const V of_q = kdk_where(q != zero, q * mixed<C>(C(k.c_qp), logp, C(k.c_qq), logq), zero);
      value += of_q;
      score += of_q + q * C(k.c_qq);
    }
  }
};

// Calls visit with the summand of a divergence.
template <class Visit>
void with_summand(int divergence, Visit visit) {
  const Divergence& entry = kDivergences[divergence];
  if (entry.linear) {
    const Linear& k = entry.coefficients;
    return k.c_qp == 0 && k.c_qq == 0 ? visit(LinearSummand<true>{k}) : visit(LinearSummand<false>{k});
  }
  int index = 0;
  while (kDivergences[index].linear) ++index;
#define KDK_CASE(FUNCTOR, NAME) \
  if (divergence == index++) return visit(FunctorSummand<FUNCTOR>());
  KDK_FUNCTORS(KDK_CASE)
#undef KDK_CASE
}

// Of statistics the summands of both KLs, both entropies and the overlap.
template <class V>
struct Distances {
  V forward = {}, reverse = {}, entropy_p = {}, entropy_q = {}, overlap = {};
  KDK_INLINE void add(V p, V logp, V q, V logq) {
    const V zero = {};
    const auto some_p = p != zero, some_q = q != zero;
    forward += kdk_where(some_p, p * (logp - logq), zero);
    reverse += kdk_where(some_q, q * (logq - logp), zero);
    entropy_p -= kdk_where(some_p, p * logp, zero);
    entropy_q -= kdk_where(some_q, q * logq, zero);
    overlap += min_of(q, p);
  }
};

}  // namespace KDK_ISA
}  // namespace kdk
