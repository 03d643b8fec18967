// Rows of which this call has some of the columns: what they add to the sums of a divergence, or their gradient, from
// normalisers that are known. One read of both models for either.
#pragma once

#include "outcomes.h"
#include "patterns.h"
#include "summand.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {

// One side of a piece: its logits after the softcap, probabilities, and their logarithms; -inf past the end.
template <class C>
struct ShardSide {
  static constexpr int64_t kPiece = 1024;
  alignas(64) C x[kPiece], p[kPiece], logp[kPiece];

  template <class X>
  void read(const X* in, int64_t count, double softcap, C unit, C top, C log_z) {
    const C up = C(softcap), down = softcap == 0 ? C(0) : C(1 / softcap);
    widen_row(in, count, x,
              [=](int64_t, Vec<C> v) KDK_LAMBDA_INLINE { return down == 0 ? v : up * tanh_fast(v * down); });
    for (int64_t j = count; j % kLanes<C> != 0; ++j) x[j] = -std::numeric_limits<C>::infinity();
    for (int64_t j = 0; j < count; j += kLanes<C>) {
      const Vec<C> log = (load<Vec<C>>(x + j) - top) * unit - log_z;
      store(logp + j, log);
      store(p + j, kdk_exp(log));
    }
  }
};

template <class C>
struct ShardRow {
  const ShardArgs& args;
  const topk::Divergence& divergence = topk::kDivergences[args.divergence];
  ShardSide<C> student, teacher;
  alignas(64) C value[ShardSide<C>::kPiece], score[ShardSide<C>::kPiece];

  explicit ShardRow(const ShardArgs& arguments) : args(arguments) {}

  // Values and scores of a piece, whose student is there.
  template <class Y>
  void evaluate(const Y* t, int64_t count, const ShardNumbers<C>& of_row, double x0) {
    teacher.read(t, count, args.teacher_softcap, of_row.teacher_unit, of_row.teacher_top, of_row.teacher_log_z);
    divergence.in(C())(divergence.coefficients, x0, args.param1, teacher.p, teacher.logp, 1, student.p, student.logp,
                       value, score, count);
  }

  template <class X, class Y>
  void add(int64_t row, const X* s, const Y* t) {
    const ShardNumbers<C>& of_row = static_cast<const ShardNumbers<C>*>(args.numbers)[row];
    const int64_t width = args.stats ? 7 : 2;
    C* const sums = static_cast<C*>(args.sums) + width * row;
    std::fill_n(sums, width, C(0));
    if (of_row.student_unit == 0) return;
    const double x0 = per_row(args.param, row, args.param0, sizeof(C) == 8);
    double value_sum = 0, score_sum = 0;
    double distance_sums[5] = {};
    for (int64_t begin = 0; begin < args.columns; begin += ShardSide<C>::kPiece) {
      const int64_t count = std::min(ShardSide<C>::kPiece, args.columns - begin);
      student.read(s + begin, count, args.student_softcap, of_row.student_unit, of_row.student_top,
                   of_row.student_log_z);
      evaluate(t + begin, count, of_row, x0);
      Vec<C> values = {}, scores = {};
      for (int64_t j = 0; j < count; j += kLanes<C>) {
        values += load<Vec<C>>(value + j);
        scores += load<Vec<C>>(score + j);
      }
      value_sum += horizontal_sum<C>(values);
      score_sum += horizontal_sum<C>(scores);
      if (args.stats) add_distances(count, distance_sums);
    }
    sums[0] = C(value_sum);
    sums[1] = C(score_sum);
    for (int64_t k = 0; k + 2 < width; ++k) sums[2 + k] = C(distance_sums[k]);
  }

  // Both KLs, both entropies and the overlap of a piece.
  void add_distances(int64_t count, double* to) const {
    Distances<Vec<C>> found;
    for (int64_t j = 0; j < count; j += kLanes<C>)
      found.add(load<Vec<C>>(teacher.p + j), load<Vec<C>>(teacher.logp + j), load<Vec<C>>(student.p + j),
                load<Vec<C>>(student.logp + j));
    const Vec<C> all[] = {found.forward, found.reverse, found.entropy_p, found.entropy_q, found.overlap};
    for (int k = 0; k < 5; ++k) to[k] += horizontal_sum<C>(all[k]);
  }

  template <class X, class Y>
  void differentiate(int64_t row, const X* s, const Y* t, X* out) {
    const ShardNumbers<C>& of_row = static_cast<const ShardNumbers<C>*>(args.numbers)[row];
    const int64_t n = args.columns;
    fill_zero(out, n, args.width);
    const bool soft = of_row.of_score != 0 || of_row.of_q != 0 || of_row.of_p != 0, hard = of_row.of_hard != 0;
    const int64_t label = args.labels == nullptr ? -1 : args.labels[row];
    const bool has_label = label >= 0 && label < n && of_row.at_label != 0;
    if (!soft && !hard && of_row.constant == 0 && !has_label) return fill_zero(out, 0, n);
    const double x0 = per_row(args.param, row, args.param0, sizeof(C) == 8);
    // Before the row is written over.
    const double label_slope = has_label && args.student_softcap != 0
                                   ? 1 - std::pow(std::tanh(double(to_compute(s[label])) / args.student_softcap), 2)
                                   : 1.0;
    double at_label = 0;
    const C inverse = args.student_softcap == 0 ? C(0) : C(1 / args.student_softcap);
    for (int64_t begin = 0; begin < n; begin += ShardSide<C>::kPiece) {
      const int64_t count = std::min(ShardSide<C>::kPiece, n - begin);
      student.read(s + begin, count, args.student_softcap, of_row.student_unit, of_row.student_top,
                   of_row.student_log_z);
      if (soft) evaluate(t + begin, count, of_row, x0);
      C* const g = value;
      for (int64_t j = 0; j < count; j += kLanes<C>) {
        Vec<C> d = Vec<C>{} + of_row.constant;
        if (soft) d += of_row.of_score * load<Vec<C>>(score + j) - of_row.of_q * load<Vec<C>>(student.p + j);
        if (of_row.of_p != 0) d += of_row.of_p * load<Vec<C>>(teacher.p + j);
        if (hard) d += of_row.of_hard * kdk_exp(load<Vec<C>>(student.x + j) - of_row.student_top - of_row.hard_log_z);
        if (inverse != 0) d *= slope_of_cap(load<Vec<C>>(student.x + j), inverse);
        store(g + j, d);
      }
      if (has_label && label >= begin && label < begin + count)
        at_label = double(g[label - begin]) + double(of_row.at_label) * label_slope;
      narrow_row(count, out + begin, Stored<C>{g});
    }
    if (has_label) from_compute(C(at_label), out + label);
  }
};

template <class X, class Y>
void shard_rows_of(const ShardArgs& args, int64_t begin, int64_t end) {
  ShardRow<typename Io<X>::C> rows(args);
  for (int64_t row = begin; row < end; ++row) {
    const X* s = row_pointer<X>(args.student, row, args.length);
    const Y* t = row_pointer<Y>(args.teacher, row, args.length);
    if (args.sums != nullptr) rows.add(row, s, t);
    if (args.dstudent.data != nullptr) rows.differentiate(row, s, t, row_pointer<X>(args.dstudent, row, args.length));
  }
}

template <class X>
void shard_rows(const ShardArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.teacher.dtype, [&](auto y) { shard_rows_of<X, decltype(y)>(args, begin, end); });
}

}  // namespace KDK_ISA
}  // namespace kdk
