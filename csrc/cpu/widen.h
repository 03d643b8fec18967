// Rows brought to the type of the sums, and back.
#pragma once

#include "reduce.h"
#include "rows.h"
#include "scratch.h"

namespace kdk {
inline namespace KDK_ISA {

// Element by element where the type of the sums is not that of the logits.
template <class C, class X>
KDK_INLINE Vec<C> widened(const X* in) {
  if constexpr (std::is_same_v<C, typename Io<X>::C>) {
    return Io<X>::widen(in);
  } else {
    Vec<C> v;
    for (int i = 0; i < kLanes<C>; ++i) v[i] = C(to_compute(in[i]));
    return v;
  }
}

// Writes map(j, x) for the vectors x of a row of logits in C, padded with zeros up to whole vectors (the scratch has
// room), and returns the sum of what it wrote for the row. Whatever can be is done on the way: a pass over a row in C
// costs half as much as its exponentials.
template <class C, class X, class Map>
double widen_row(const X* in, int64_t n, C* out, Map map) {
  double total = 0;
  const int64_t whole = n - n % kLanes<C>;
  for (int64_t j = 0; j < whole;) {
    Vec<C> sum = {};
    for (const int64_t end = std::min(whole, j + kTileElements); j < end; j += kLanes<C>) {
      prefetch_ahead<kLanes<C>>(in + j);
      const Vec<C> x = map(j, widened<C>(in + j));
      store(out + j, x);
      sum += x;
    }
    total += horizontal_sum<C>(sum);
  }
  if (whole < n) {
    X last[kLanes<C>] = {};
    std::copy(in + whole, in + n, last);
    store(out + whole, map(whole, widened<C>(last)));
    for (int64_t j = whole; j < n; ++j) total += double(out[j]);
  }
  return total;
}
template <class C, class Map>
double widen_row(const LogitsView& view, int64_t row, int64_t length, int64_t n, C* out, Map map) {
  return with_dtype(view.dtype,
                    [&](auto x) { return widen_row(row_pointer<decltype(x)>(view, row, length), n, out, map); });
}
// Leaves logits as they are.
struct AsIs {
  template <class V>
  KDK_INLINE V operator()(int64_t, V x) const {
    return x;
  }
};

// Writes value(j) for the vectors of a row.
template <class X, class Value>
void narrow_row(int64_t n, X* out, Value value) {
  using C = typename Io<X>::C;
  int64_t j = 0;
  for (; j + kLanes<C> <= n; j += kLanes<C>) Io<X>::narrow(out + j, value(j));
  if (j < n) {
    X last[kLanes<C>];
    Io<X>::narrow(last, value(j));
    std::copy(last, last + (n - j), out + j);
  }
}

template <class C>
struct Stored {
  const C* values;
  KDK_INLINE Vec<C> operator()(int64_t j) const { return load<Vec<C>>(values + j); }
};

// A row of logits in C after its softcap (0: none), seen by map; returns their sum.
template <class C, class Map>
double capped_row(const LogitsView& view, int64_t row, int64_t length, int64_t n, double cap, C* out, Map map) {
  if (cap == 0) return widen_row(view, row, length, n, out, map);
  const C up = C(cap), down = C(1 / cap);
  return widen_row(view, row, length, n, out,
                   [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE { return map(j, up * tanh_fast(x * down)); });
}
// The factor from the gradient by a capped logit to that by the logit itself.
template <class C>
KDK_INLINE Vec<C> slope_of_cap(Vec<C> capped, C inverse_cap) {
  const Vec<C> ratio = capped * inverse_cap;
  return 1 - ratio * ratio;
}

// A teacher's row as it is, or where it is of another type, in C.
template <class X>
const X* row_as(const LogitsView& teacher, const RowArgs& args, int64_t row, bool as_is) {
  using C = typename Io<X>::C;
  if constexpr (std::is_same_v<X, C>) {
    if (!as_is) {
      C* out = Scratch<C>::mine().get(kTeacherRow, args.columns);
      widen_row(teacher, row, args.length, args.columns, out, AsIs());
      return out;
    }
  }
  return row_pointer<X>(teacher, row, args.length);
}

// True where the student's logits are taken, and its gradient is given, as they are.
template <class X>
bool is_direct(const RowArgs& args, const LogitsView& teacher) {
  return std::is_same_v<X, typename Io<X>::C> || teacher.dtype == args.student.dtype;
}

}  // namespace KDK_ISA
}  // namespace kdk
