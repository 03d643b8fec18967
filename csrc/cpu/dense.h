// The dense pattern: a teacher's distribution over all columns.
#pragma once

#include "log_probs.h"
#include "objective.h"
#include "patterns.h"
#include "teacher.h"

namespace kdk {
inline namespace KDK_ISA {

// Cross entropy and z-loss of a row of logits alone, given less a centre, added to result; their gradient is added to
// g.
template <class C>
void add_hard_terms(const DenseArgs& args, const RowNumbers& num, const C* s, C centre, int64_t label, C* g,
                    RowResult& result) {
  const int64_t n = args.columns;
  const Affine<C> a = affine<C>(kLog2e, maximum(s, n));
  const double log2_z = log2_sum_exp(s, n, a), reference = a.logit(), lse = double(centre) + reference + kLn2 * log2_z;
  const double cross_entropy =
      args.values_ce(num.ce) ? cross_entropy_of(s, n, label, args.label_smoothing, reference, kLn2 * log2_z) : 0;
  result.loss += (num.ce != 0 ? num.ce * cross_entropy : 0) + num.z * lse * lse;
  result.stats[1] = cross_entropy;
  result.stats[2] = lse;
  if (g == nullptr || (num.ce == 0 && num.z == 0)) return;
  const C c1 = C(num.weight * (num.ce + (num.z != 0 ? 2 * num.z * lse : 0)) * std::exp2(-log2_z));
  const C c0 = C(-num.weight * num.ce * args.label_smoothing / double(n));
  for (int64_t j = 0; j < n; j += kLanes<C>)
    store(g + j, load<Vec<C>>(g + j) + exp2_fast<5>(clamp_exponent(a(load<Vec<C>>(s + j)))) * c1 + c0);
  if (num.ce != 0 && label >= 0 && label < n) g[label] -= C(num.weight * num.ce * (1 - args.label_smoothing));
}

// The student's logits are read, and its gradient written, as they are; the teacher's too, of type Y, or brought to
// logits in C row by row where PREPARED.
template <class X, class Y, bool PREPARED>
void dense_direct(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  // Where the gradient needs the logits again, it is written while they are in the caches.
  const Sums sums = sums_for(args);
  const bool needs_logits = has_logs(kDivergences[args.divergence]) && sums != kReverse && (sums & kKept) == 0;
  const bool deferred = kDefers<X> && !needs_logits;
  ObjectiveRows<X, Y> rows(args, streams(args, sizeof(X), deferred), deferred);
  const bool numbers_differ = PREPARED || args.numbers_differ();
  RowNumbers num = row_numbers<C>(args, begin, 1);
  run_rows<X>(rows, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    const X* s = rows.student(row, out);
    if (numbers_differ) num = row_numbers<C>(args, row, 1);
    num.weight = weight;
    const Y* t;
    if constexpr (PREPARED) {
      t = teacher_row<C>(args, row, num.teacher_scale);
    } else {
      t = row_pointer<Y>(args.teachers[0], row, args.length);
      const bool has_next = is_read(args, row + 1, end);
      rows.ahead.next_s = has_next ? row_pointer<X>(args.student, row + 1, args.length) : nullptr;
      rows.ahead.next_t = has_next ? row_pointer<Y>(args.teachers[0], row + 1, args.length) : nullptr;
    }
    C* stats = args.stats == nullptr ? nullptr : static_cast<C*>(args.stats) + row * kStats;
    const RowResult result = rows.add(num, s, t, label, out, stats == nullptr ? nullptr : stats + 8);
    put_stats<C>(args, row, result);
    return result.loss;
  });
}

// The student's row in C, with its bias and after its softcap; returns the sum.
template <class C>
double student_row(const DenseArgs& args, int64_t row, C* out) {
  const C* bias = static_cast<const C*>(args.of_columns.student_bias);
  const int64_t n = args.columns;
  if (bias == nullptr) return capped_row(args.student, row, args.length, n, args.student_softcap, out, AsIs());
  const double cap = args.student_softcap;
  return widen_row(args.student, row, args.length, n, out, [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE {
    x += load_within(bias, j, n);
    return cap == 0 ? x : C(cap) * tanh_fast(x * C(1 / cap));
  });
}

// Anything else: rows are first brought to logits in C, and the gradient is taken back through what was done to the
// student.
template <class X>
void dense_generic(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const int64_t n = args.columns;
  Scratch<C>& scratch = Scratch<C>::mine();
  ObjectiveRows<C> rows(args, false, false);
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    RowNumbers num = row_numbers<C>(args, row, weight);
    const double tempered = num.student_scale;
    const C* t = teacher_row<C>(args, row, num.teacher_scale);
    C* s = scratch.get(kStudentRow, n);
    const double sum = student_row(args, row, s);
    C* g = out == nullptr ? nullptr : scratch.get(kGradientRow, n);
    RowResult result;
    C centre = 0, mean = 0, slope = 0;
    if (args.standardize) {
      // The divergence sees z = (s - mean) / std, whose softmax is that of s at T std; the other terms see s. A mean
      // that is large beside std would be most of every s: it is taken off before anything is multiplied.
      const Moments<C> m = moments(s, n, sum);
      centre = m.centre, mean = C(m.rest);
      if (m.unit == 1)
        for (int64_t j = 0; j < n; j += kLanes<C>) store(s + j, load<Vec<C>>(s + j) - centre);
      RowNumbers soft = num;
      soft.student_scale = tempered / m.std;
      soft.ce = soft.z = 0;
      result = rows.add(soft, s, t, label, g, nullptr);
      if (g != nullptr) {
        // add() divided by T std: dz = std * that, ds = (dz - z sum(dz z) / (n - 1)) / std.
        const int64_t whole = n - n % kLanes<C>;
        double along = sum_over_row<C>(
            whole, [&](int64_t j) KDK_LAMBDA_INLINE { return load<Vec<C>>(g + j) * (load<Vec<C>>(s + j) - mean); });
        for (int64_t j = whole; j < n; ++j) along += double(g[j]) * double(s[j] - mean);
        slope = C(along / (m.std * m.std * double(std::max<int64_t>(n - 1, 1))));
      }
      const bool hard = num.ce != 0 || num.z != 0 || args.stats != nullptr;
      if (hard || m.unit != 1) {
        // Their gradient is that by the raw logits already.
        const C inverse_unit = C(1 / m.unit);
        for (int64_t j = 0; g != nullptr && j < n; j += kLanes<C>)
          store(g + j, (load<Vec<C>>(g + j) - (load<Vec<C>>(s + j) - mean) * slope) * inverse_unit);
        slope = 0;
      }
      if (m.unit != 1) {
        student_row(args, row, s);
        centre = 0;
      }
      if (hard) add_hard_terms(args, num, s, centre, label, g, result);
    } else {
      result = rows.add(num, s, t, label, g, nullptr);
    }
    if (g != nullptr) {
      const C inverse = args.student_softcap == 0 ? C(0) : C(1 / args.student_softcap);
      if (slope == 0 && inverse == 0) {
        narrow_row(n, out, Stored<C>{g});
      } else {
        narrow_row(n, out, [&](int64_t j) KDK_LAMBDA_INLINE {
          const Vec<C> x = load<Vec<C>>(s + j);
          return (load<Vec<C>>(g + j) - (x - mean) * slope) * slope_of_cap(x + centre, inverse);
        });
      }
    }
    put_stats<C>(args, row, result);
    return result.loss;
  });
}

template <class X>
void dense_rows(const DenseArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  if (args.student_log_probs) return log_prob_rows<X>(args, begin, end);
  if (args.student_softcap != 0 || args.standardize || args.of_columns.student_bias != nullptr)
    return dense_generic<X>(args, begin, end);
  const bool logits_alone = args.mixture == Mixture::kNone && args.teacher_form == TeacherForm::kLogits &&
                            args.teacher_softcap == 0 && !args.of_columns.change_teacher();
  const DType teacher = args.teachers[0].dtype;
  if (logits_alone && teacher == args.student.dtype) return dense_direct<X, X, false>(args, begin, end);
  if constexpr (std::is_same_v<X, BFloat16>)
    if (logits_alone && teacher == DType::kFloat32) return dense_direct<X, float, false>(args, begin, end);
  // Not beside fp16: it would take the compiler as long again as bf16 does.
  if constexpr (std::is_same_v<X, Half>) {
    dense_generic<X>(args, begin, end);
  } else {
    dense_direct<X, C, true>(args, begin, end);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
