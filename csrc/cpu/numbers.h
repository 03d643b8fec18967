// The numbers of one row of an objective, and the sums and options that its calls share.
#pragma once

#include "affine.h"
#include "io.h"
#include "kernels.h"

#include <cmath>

namespace kdk {
inline namespace KDK_ISA {

inline double per_row(const PerRow& values, int64_t row, double otherwise, bool fp64) {
  if (values.data == nullptr) return otherwise;
  const int64_t offset = row * values.stride;
  return fp64 ? static_cast<const double*>(values.data)[offset]
              : double(static_cast<const float*>(values.data)[offset]);
}

// A divergence, or an entropy, is not below 0; what rounds to less is 0.
inline double at_least_0(double x) { return x < 0 ? 0 : x; }

// The numbers of one row of the objective.
struct RowNumbers {
  double weight;                        // omega
  double student_scale, teacher_scale;  // log2(e) / T
  double kd, tau, ce, z;                // weights of the terms, before omega
  double param0;
  double teacher_lse;  // see ObjectiveArgs
};

// Losses and statistics of a row, before omega.
struct RowResult {
  double loss = 0;
  double stats[kStats] = {};
};

template <class C>
RowNumbers row_numbers(const ObjectiveArgs& args, int64_t row, double weight) {
  constexpr bool fp64 = sizeof(C) == 8;
  const double temperature = per_row(args.student_temperature, row, args.temperature, fp64);
  const double teacher_temperature = per_row(args.teacher_temperature, row, args.teacher_temperature_value, fp64);
  return {weight,
          kLog2e / temperature,
          kLog2e / teacher_temperature,
          args.kd_weight * per_row(args.kd_weights, row, 1.0, fp64),
          args.scale_by_t_squared ? temperature * temperature : 1.0,
          args.ce_weight * per_row(args.ce_weights, row, 1.0, fp64),
          args.z_loss_weight * per_row(args.z_loss_weights, row, 1.0, fp64),
          per_row(args.param, row, args.param0, fp64),
          per_row(args.teacher_lse, row, 0.0, fp64)};
}

template <class C>
void put(void* array, int64_t index, double value) {
  static_cast<C*>(array)[index] = C(value);
}
template <class C, int COLUMNS = kStats>
void put_stats(const ObjectiveArgs& args, int64_t row, const RowResult& result) {
  if (args.stats == nullptr) return;
  for (int k = 0; k < COLUMNS; ++k) put<C>(args.stats, row * COLUMNS + k, result.stats[k]);
}

}  // namespace KDK_ISA
}  // namespace kdk
