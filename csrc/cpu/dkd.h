// Decoupled distillation.
#pragma once

#include "objective.h"
#include "patterns.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {

// The rows of one call of decoupled distillation, one after the other: forward KL over the other classes, and the
// two-way KL of the label against them in scalars.
template <class X>
struct DkdRows : CallRows<DkdArgs, X> {
  using Base = CallRows<DkdArgs, X>;
  using C = typename Io<X>::C;
  using Base::args, Base::n;
  C* const es_of_body = Base::place_of_body(kEs);
  C* const et_of_body = Base::place_of_body(kEt);

  DkdRows(const DkdArgs& arguments, bool streams, bool defers) : Base(arguments, streams, defers, streams) {}

  double add(double weight, const X* s, const X* t, int64_t label, X* out);
};

// The maxima of both models over the elements of a row that are not left out.
template <class X>
Seeds maxima_of_counted(const Row<X>& row) {
  using C = typename Io<X>::C;
  constexpr double lowest = -std::numeric_limits<double>::infinity();
  Seeds high{lowest, lowest};
  for (int64_t tile = 0; tile < row.tiles(); ++tile)
    row.pieces(tile, [&](const X* s, const X* t, int64_t blocks, int64_t, int64_t, auto lanes) {
      const auto largest = [&](const X* x) {
        if constexpr (!lanes.kEdge) return maximum(x, blocks * Row<X>::kBlock);
        Vec<C> a, b;
        load_block(x, lanes, C(lowest), a, b);
        return double(horizontal_max<C>(max_keep_nan(a, b)));
      };
      high.s = std::max(high.s, largest(s));
      high.t = std::max(high.t, largest(t));
    });
  return high;
}

template <class X>
double DkdRows<X>::add(double weight, const X* s, const X* t, int64_t label, X* out) {
  if (label < 0 || label >= n) {
    if (out != nullptr) fill_zero(out, 0, n);
    return std::numeric_limits<double>::quiet_NaN();
  }
  if (args.alpha == 0 && args.beta == 0) {
    // Without any term nothing of the logits counts, be it NaN.
    if (out != nullptr) fill_zero(out, 0, n);
    return 0;
  }
  Row<X> row(s, t, n, head_elements(out, Base::aligned));
  row.exclude(label);
  prefetch_edges(row, out);
  const int64_t head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  C *const es = es_of_body - head_slots, *const et = et_of_body - head_slots;
  Affine<C> as, at;
  RowSums sums;
  const auto sweep = [&](const Seeds& seeds, bool) KDK_LAMBDA_INLINE {
    as = affine<C>(kLog2e / args.temperature, seeds.s);
    at = affine<C>(kLog2e / args.teacher_temperature, seeds.t);
    sums = RowSums();
    bool unclamped = true;
    for (int64_t tile = 0; tile < row.tiles(); ++tile)
      sweep_tile<kForward>(row, tile, as, at, es, et, es, unclamped, true, sums, Base::pending);
    Base::pending.finish();
    // The label may have set the reference far above all others, which are alone in these sums.
    const auto in_range = [](double z) { return !(z > kLargestSum || z < 1 / kLargestSum); };
    return in_range(sums.zs) && in_range(sums.zt);
  };
  const int64_t seen = std::min(n, kSeedElements);
  sweep_in_range(Seeds{maximum(s, seen), maximum(t, seen)}, sweep, [&] { return maxima_of_counted(row); });
  const double label_s = to_compute(s[label]), label_t = to_compute(t[label]);
  const double xs = as.scalar(label_s), xt = at.scalar(label_t);
  const double log2_zs = std::log2(sums.zs), log2_zt = std::log2(sums.zt);
  const bool others = n > 1;
  const double nckd = others ? kLn2 * (sums.forward / sums.zt - log2_zt + log2_zs) : 0;
  // Two-way distribution from the difference between the label and all others, stable on both ends.
  const double gap_q = kLn2 * (xs - log2_zs), gap_p = kLn2 * (xt - log2_zt);
  const auto log_sigmoid = [](double x) { return x > 0 ? -std::log1p(std::exp(-x)) : x - std::log1p(std::exp(x)); };
  const double log_q = others ? log_sigmoid(gap_q) : 0, log_p = others ? log_sigmoid(gap_p) : 0;
  const double log_rest_q = log_sigmoid(-gap_q), log_rest_p = log_sigmoid(-gap_p);
  const double p = std::exp(log_p), rest_p = others ? std::exp(log_rest_p) : 0;
  // One class alone has all the probability, unless it has none.
  double tckd = p > 0 ? p * (log_p - log_q) : 0;
  if (!others) tckd = (label_s - label_s) + (label_t - label_t);
  if (rest_p > 0) tckd += rest_p * (log_rest_p - log_rest_q);
  const double tau = args.scale_by_t_squared ? args.temperature * args.temperature : 1;
  // A term of weight 0 is none, be it infinite.
  const auto weighed = [](double factor, double term) { return factor == 0 ? 0 : factor * term; };
  if (out != nullptr) {
    const double f = weight * tau / args.temperature;
    // p - q, from the two small ones of the four probabilities. For another class, dTCKD = q^ (p - q) with q^ its share
    // of the rest.
    const double difference = p < 0.5 ? p - std::exp(log_q) : std::exp(log_rest_q) - rest_p;
    GradientTerms<C> terms;
    terms.es = es;
    terms.et = et;
    terms.array = es;
    if (others) {
      terms.a = f * (args.beta + weighed(args.alpha, difference)) / sums.zs;
      terms.b = f * weighed(args.beta, 1 / sums.zt);
    }
    const double at_label = others ? -f * weighed(args.alpha, difference) : 0;
    Base::write(row, terms, out, Base::deferred, label, at_label);
  }
  return tau * (weighed(args.alpha, tckd) + weighed(args.beta, nckd));
}

// The student's logits are read, and its gradient written, as they are.
template <class X>
void dkd_direct(const DkdArgs& args, int64_t begin, int64_t end) {
  const bool as_is = args.teacher.dtype == args.student.dtype;
  DkdRows<X> rows(args, streams(args, sizeof(X), kDefers<X>), kDefers<X>);
  run_rows<X>(rows, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    return rows.add(weight, rows.student(row, out), row_as<X>(args.teacher, args, row, as_is), label, out);
  });
}
// Both are brought to C.
template <class X>
void dkd_widened(const DkdArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  Scratch<C>& scratch = Scratch<C>::mine();
  DkdRows<C> rows(args, false, false);
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    C *student = scratch.get(kStudentRow, args.columns), *teacher = scratch.get(kTeacherRow, args.columns);
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, args.columns);
    widen_row(args.student, row, args.length, args.columns, student, AsIs());
    widen_row(args.teacher, row, args.length, args.columns, teacher, AsIs());
    const double loss = rows.add(weight, student, teacher, label, g);
    if (g != nullptr) narrow_row(args.columns, out, Stored<C>{g});
    return loss;
  });
}

template <class X>
void dkd_rows(const DkdArgs& args, int64_t begin, int64_t end) {
  return is_direct<X>(args, args.teacher) ? dkd_direct<X>(args, begin, end) : dkd_widened<X>(args, begin, end);
}

}  // namespace KDK_ISA
}  // namespace kdk
