// Gradients times a factor.
#pragma once

#include "patterns.h"
#include "rows.h"

namespace kdk {
inline namespace KDK_ISA {

template <class X>
void scale_rows(const ScaleArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  for (int64_t row = begin; row < end; ++row) {
    const double factor = with_dtype(args.factor_dtype, [&](auto x) {
      return double(to_compute(static_cast<const decltype(x)*>(args.factor)[row * args.factor_stride]));
    });
    if (factor == 1) continue;
    X* g = row_pointer<X>(args.grad, row, args.length);
    const C c = C(factor);
    int64_t j = 0;
    for (; j + Io<X>::kBlock <= args.width; j += Io<X>::kBlock) {
      Vec<C> a, b;
      Io<X>::load2(g + j, a, b);
      Io<X>::template store2<false>(g + j, a * c, b * c);
    }
    for (; j < args.width; ++j) from_compute(to_compute(g[j]) * c, g + j);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
