// The sums over a row that a sweep makes of both models.
#pragma once

#include "io.h"

#include <limits>
#include <type_traits>

namespace kdk {
inline namespace KDK_ISA {

// The sums over e^x that a sweep makes: of et (xt - xs), of es (xs - xt), of et xt, of es xs with the maxima. With
// kKept the terms of kReverse are kept for the gradient, in a place of their own; kOneModel is for one model alone.
enum Sums {
  kNoSums = 0,
  kForward = 1,
  kReverse = 2,
  kTeacher = 4,
  kStudent = 8,
  kKept = 16,
  kForwardAndTeacher = kForward | kTeacher,
  kBoth = kForward | kReverse | kKept,
  kAll = kForward | kReverse | kTeacher | kStudent,
  kAllKept = kAll | kKept,
  kOneModel = 32
};

// Calls visit(integral_constant) with the sums that a row of both models needs.
template <class Visit>
KDK_INLINE auto visit_sums(Sums sums, Visit visit) {
  switch (sums) {
    case kNoSums: return visit(std::integral_constant<int, kNoSums>());
    case kForward: return visit(std::integral_constant<int, kForward>());
    case kReverse: return visit(std::integral_constant<int, kReverse>());
    case kBoth: return visit(std::integral_constant<int, kBoth>());
    case kForwardAndTeacher: return visit(std::integral_constant<int, kForwardAndTeacher>());
    case kAllKept: return visit(std::integral_constant<int, kAllKept>());
    default: return visit(std::integral_constant<int, kAll>());
  }
}

template <class C>
struct Accumulators {
  Vec<C> zs = {}, zt = {}, forward = {}, teacher = {}, reverse = {}, student = {}, max_s, max_t;
};

// Sums of a row relative to its references, in double.
struct RowSums {
  double zs = 0, zt = 0, forward = 0, teacher = 0, reverse = 0, student = 0;
  double most = 0;  // of zs in one lane of one tile, at least what its largest
                    // exponential is
  double max_s = -std::numeric_limits<double>::infinity(),
         max_t = max_s;  // of x, under kStudent only
  int64_t best_tile_s = 0, best_tile_t = 0;

  void see_maximum(int64_t tile, double high_s, double high_t) {
    if (high_s > max_s) max_s = high_s, best_tile_s = tile;
    if (high_t > max_t) max_t = high_t, best_tile_t = tile;
  }
};

}  // namespace KDK_ISA
}  // namespace kdk
