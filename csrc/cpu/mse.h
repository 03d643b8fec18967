// Mean squared differences of logits.
#pragma once

#include "gradient.h"
#include "patterns.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {

// Mean squared difference of the logits of one row: a pass over memory, or two over a row that the caches hold by then.
template <bool STREAM, class X>
double mse_row(const MseArgs& args, double weight, const X* s, const X* t, X* out) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  const int64_t n = args.columns;
  const Row<X> row(s, t, n, head_elements(out, STREAM));
  // Calls visit(difference, difference, first) for the whole blocks of a tile.
  const auto differences = [&](int64_t tile, V centre, auto visit) KDK_LAMBDA_INLINE {
    row.template pieces<kBody>(
        tile, [&](const X* ps, const X* pt, int64_t blocks, int64_t, int64_t first, auto) KDK_LAMBDA_INLINE {
          for (int64_t i = 0; i < blocks; ++i, ps += block, pt += block) {
            prefetch_ahead<block>(ps);
            prefetch_ahead<block>(pt);
            V s0, s1, t0, t1;
            Io<X>::load2(ps, s0, s1);
            Io<X>::load2(pt, t0, t1);
            visit(s0 - t0 - centre, s1 - t1 - centre, first + i * block);
          }
        });
  };
  // The elements that fill no block, one by one.
  const auto edges = [&](auto visit) KDK_LAMBDA_INLINE {
    for (int64_t j = 0; j < row.head; ++j) visit(j);
    for (int64_t j = n - row.tail; j < n; ++j) visit(j);
  };
  const auto difference = [&](int64_t j) { return double(to_compute(s[j])) - double(to_compute(t[j])); };
  double mean = 0;
  if (args.centered) {
    for (int64_t tile = 0; tile < row.tiles(); ++tile) {
      V sum0 = {}, sum1 = {};
      differences(tile, V{}, [&](V d0, V d1, int64_t) KDK_LAMBDA_INLINE { sum0 += d0, sum1 += d1; });
      mean += horizontal_sum<C>(sum0 + sum1);
    }
    edges([&](int64_t j) { mean += difference(j); });
    mean /= double(n);
  }
  // The derivative of the mean falls out: the centred differences sum to 0.
  const C factor = C(2 * weight / double(n));
  double squares = 0;
  edges([&](int64_t j) {
    const double d = difference(j) - mean;
    squares += d * d;
    if (out != nullptr) from_compute(C(double(factor) * d), out + j);
  });
  for (int64_t tile = 0; tile < row.tiles(); ++tile) {
    V sum0 = {}, sum1 = {};
    differences(tile, V{} + C(mean), [&](V d0, V d1, int64_t first) KDK_LAMBDA_INLINE {
      sum0 += d0 * d0;
      sum1 += d1 * d1;
      if (out != nullptr) Io<X>::template store2<STREAM>(out + first, d0 * factor, d1 * factor);
    });
    squares += horizontal_sum<C>(sum0 + sum1);
  }
  return squares / double(n);
}

template <class X>
void mse_rows(const MseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const bool direct = is_direct<X>(args, args.teacher), streamed = direct && streams(args, sizeof(X));
  const bool as_is = args.teacher.dtype == args.student.dtype;
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t, double weight, X* out) {
    const X* s = row_pointer<X>(args.student, row, args.length);
    if (direct) {
      const X* t = row_as<X>(args.teacher, args, row, as_is);
      return streamed ? mse_row<true>(args, weight, s, t, out) : mse_row<false>(args, weight, s, t, out);
    }
    Scratch<C>& scratch = Scratch<C>::mine();
    C *student = scratch.get(kStudentRow, args.columns), *teacher = scratch.get(kTeacherRow, args.columns);
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, args.columns);
    widen_row(args.student, row, args.length, args.columns, student, AsIs());
    widen_row(args.teacher, row, args.length, args.columns, teacher, AsIs());
    const double loss = mse_row<false, C>(args, weight, student, teacher, g);
    if (g != nullptr) narrow_row(args.columns, out, Stored<C>{g});
    return loss;
  });
}

}  // namespace KDK_ISA
}  // namespace kdk
