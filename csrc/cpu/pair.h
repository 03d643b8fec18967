// Two values that go through the same instructions side by side.
#pragma once

#include "vector.h"

namespace kdk {
inline namespace KDK_ISA {

// Two values that go through the same instructions side by side, and pairs of pairs. A functor's chain of dependent
// instructions outlasts the window in which the processor looks for independent ones; written four abreast they stand
// next to each other.
template <class T>
struct Pair {
  T a, b;
  Pair() = default;
  KDK_INLINE Pair(T x, T y) : a(x), b(y) {}
};
#define KDK_PAIR_OPERATOR(op)                                       \
  template <class T>                                                \
  KDK_INLINE auto operator op(const Pair<T>& x, const Pair<T>& y) { \
    return Pair<decltype(x.a op y.a)>(x.a op y.a, x.b op y.b);      \
  }                                                                 \
  template <class T>                                                \
  KDK_INLINE Pair<T> operator op(const Pair<T>& x, float y) {       \
    return Pair<T>(x.a op y, x.b op y);                             \
  }                                                                 \
  template <class T>                                                \
  KDK_INLINE Pair<T> operator op(float x, const Pair<T>& y) {       \
    return Pair<T>(x op y.a, x op y.b);                             \
  }
KDK_PAIR_OPERATOR(+)
KDK_PAIR_OPERATOR(-)
KDK_PAIR_OPERATOR(*)
KDK_PAIR_OPERATOR(/)
KDK_PAIR_OPERATOR(>)
KDK_PAIR_OPERATOR(<)
KDK_PAIR_OPERATOR(==)
KDK_PAIR_OPERATOR(&)
KDK_PAIR_OPERATOR(|)
#undef KDK_PAIR_OPERATOR
template <class T>
KDK_INLINE Pair<T> operator-(const Pair<T>& x) {
  return Pair<T>(-x.a, -x.b);
}
template <class M, class T>
KDK_INLINE Pair<T> kdk_where(const Pair<M>& mask, const Pair<T>& x, const Pair<T>& y) {
  return Pair<T>(kdk_where(mask.a, x.a, y.a), kdk_where(mask.b, x.b, y.b));
}
template <class T>
KDK_INLINE Pair<T> unfused(const Pair<T>& x) {
  return Pair<T>(unfused(x.a), unfused(x.b));
}
template <class T>
KDK_INLINE T horizontal(const Pair<T>& x) {
  return x.a + x.b;
}

template <class C>
KDK_INLINE Pair<Pair<Vec<C>>> load4(const C* x) {
  using V = Vec<C>;
  return {{load<V>(x), load<V>(x + kLanes<C>)}, {load<V>(x + 2 * kLanes<C>), load<V>(x + 3 * kLanes<C>)}};
}
template <class C>
KDK_INLINE void store4(C* x, const Pair<Pair<Vec<C>>>& v) {
  store(x, v.a.a);
  store(x + kLanes<C>, v.a.b);
  store(x + 2 * kLanes<C>, v.b.a);
  store(x + 3 * kLanes<C>, v.b.b);
}

}  // namespace KDK_ISA
}  // namespace kdk
