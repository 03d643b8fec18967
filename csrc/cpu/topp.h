// How many of a row's columns, the most probable first, have a mass of p together.
#pragma once

#include "patterns.h"
#include "steps.h"
#include "widen.h"

#include <functional>

namespace kdk {
inline namespace KDK_ISA {

// The number of equal columns that bring a mass to p.
inline int64_t columns_to(double p, double mass, double each, int64_t most) {
  const double needed = std::ceil((p - mass) / each);
  return needed >= double(most) ? most : std::max<int64_t>(1, int64_t(needed));
}

template <class X, class C = typename Io<X>::C>
int64_t topp_of_row(const X* row, int64_t n, double scale, double p) {
  Steps<C>& steps = Steps<C>::mine(0);
  const Found found = find_steps(row, n, scale, false, steps);
  if (!steps.sound()) return 1;
  const auto outcomes = [&] {
    int64_t count = 0;
    for (int64_t j = 0; j < n; ++j) count += to_compute(row[j]) > -std::numeric_limits<C>::infinity();
    return count;
  };
  if (p >= 1) return outcomes();
  double mass = 0;
  for (int64_t k = 0; k < steps.count; ++k) {
    const double each = double(steps.probs[size_t(k)]), here = each * steps.columns(k);
    if (!(mass + here >= p) || each == 0) {
      mass += here;
      continue;
    }
    if (found != Found::kByBins) return steps.begin(k) + columns_to(p, mass, each, steps.columns(k));
    if constexpr (std::is_same_v<X, float> && std::is_same_v<C, float>) {
      // The columns of this bin one by one.
      const Affine<float> as = steps.affine;
      std::vector<float> within;
      Bins& bins = Bins::mine();
      bins.tiles(row, n, Bins::Ruler(steps.top, scale), [&](int64_t begin, int64_t end) KDK_LAMBDA_INLINE {
        const VecU bin = VecU{} + uint32_t(steps.keys[size_t(k)]);
        for (int64_t j = 0; j < end - begin; j += kLanes<float>) {
          uint32_t hits = lane_bits(bit_cast<VecI>((load<VecU>(bins.places.data() + j) >> kPlaceBits) == bin));
          for (; hits != 0; hits &= hits - 1) {
            const int64_t column = begin + j + __builtin_ctz(hits);
            if (column < end) within.push_back(row[column]);
          }
        }
      });
      std::sort(within.begin(), within.end(), std::greater<float>());
      int64_t count = steps.begin(k);
      for (const float x : within) {
        ++count;
        mass += std::exp2(as.scalar(double(x)) - steps.log2_z);
        if (mass >= p) break;
      }
      return count;
    }
  }
  return outcomes();
}

template <class X>
void topp_rows(const ToppArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  for (int64_t row = begin; row < end; ++row) {
    const double t = per_row(args.temperature_rows, row, args.temperature, sizeof(C) == 8);
    args.counts[row] = topp_of_row(row_pointer<X>(args.logits, row, args.length), args.columns, kLog2e / t, args.p);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
