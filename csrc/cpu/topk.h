// The sparse top-k pattern for one instruction set: a teacher of K ids and log-probabilities a row.
//
// The student's row is read once: its exponentials go to a row scratch (L2), and the gradient is written from there.
// The K entries are computed in double. Of the outcomes outside the K entries only two things are
// needed in most modes: their mass, which is added up without the entries where subtracting those would cancel, and one
// factor, for their gradient is proportional to q. Where the teacher spreads mass over them, or a divergence is not
// homogeneous in (p, q), values and scores of all outcomes are computed instead, in the scratch.
//
// x, z and r as in affine.h.
#pragma once

#include "call.h"
#include "capture.h"
#include "objective.h"
#include "outcomes.h"
#include "patterns.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {

namespace topk {

// A sum of exponentials outside the entries from which on their reference, that of the first elements, was too far
// below some of them: an exponent of 14 has an error of 5e-7.
constexpr double kFar = 0x1p14;

// As sweep_student; from the row's maximum where that is asked for.
template <bool KEEP_X, class X, class C, class Waiting = const NothingPending>
double sweep_student_from(const Row<X>& row, int64_t n, double scale, bool from_maximum, Affine<C>& as, C* es, C* xs,
                          Waiting& pending = kNothingPending) {
  if (!from_maximum) return sweep_student<KEEP_X>(row, n, scale, as, es, xs, pending);
  as = affine<C>(scale, maximum(row.s, n));
  double z = 0;
  for (int64_t tile = 0; tile < row.tiles(); ++tile) z += student_exponentials<KEEP_X>(row, tile, as, es, xs);
  return z;
}

// Replaces the entries' exponentials by numbers that give their gradient g; false, and nothing done, where those leave
// the range. Written afterwards, each would bring a line back that was just streamed to memory.
template <class C>
bool put_in_scratch(const GradientTerms<C>& k, const Entries& entries, const double* g) {
  const double limit = 1e30 * std::abs(k.a), over_a = 1 / k.a;
  if (!(limit > 1)) return false;
  int64_t within = 0;
  for (int64_t j = 0; j < entries.count; ++j) within += std::abs(g[j] - k.c0) < limit;
  if (within != entries.count) return false;
  for (int64_t j = 0; j < entries.count; ++j) {
    const int64_t slot = entries.slots[size_t(j)];
    if (k.two_models) k.et[slot] = 0;
    if (k.extra == Extra::kArray) k.array[slot] = 0;
    k.es[slot] = C((g[j] - k.c0) * over_a);
  }
  return true;
}

// The fraction of a row's K' entries whose logit is at least the K'-th largest. No logit is NaN.
template <class X>
double overlap(const X* s, int64_t n, const Entries& entries) {
  using C = typename Io<X>::C;
  if (entries.count == 0) return 0;
  auto& largest = capture::Largest<C>::mine();
  largest.find(s, n, entries.count, 1.0);
  C threshold = -std::numeric_limits<C>::infinity();
  if (largest.count == entries.count) {
    const auto last = std::min_element(largest.keys.begin(), largest.keys.begin() + largest.count);
    threshold = capture::logit_of<C>(*last);
  }
  int64_t among = 0;
  for (int64_t k = 0; k < entries.count; ++k) among += C(to_compute(s[entries.ids[size_t(k)]])) >= threshold;
  return double(among) / double(entries.count);
}

// The rows of one call, one after the other.
template <class X>
struct SparseRows : CallRows<TopkArgs, X> {
  using Base = CallRows<TopkArgs, X>;
  using C = typename Io<X>::C;
  C* const es_of_body = Base::place_of_body(kEs);

  SparseRows(const TopkArgs& arguments, bool streams, bool defers)
      : Base(arguments, streams, defers,
             streams || (defers && arguments.columns * int64_t(sizeof(X)) >= kStreamRowBytes)) {}

  // One row, which is the index-th; the gradient goes to out (null: none).
  RowResult add(const RowNumbers& num, int64_t index, const X* s, int64_t label, X* out);
};

// One row, in phases.
template <class X>
struct SparseRow {
  using C = typename Io<X>::C;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  SparseRows<X>& rows;
  const RowNumbers& num;
  const int64_t index;
  const X* s;
  const int64_t label;
  X* out;

  const TopkArgs& args = rows.args;
  const int64_t n = rows.n;
  const Divergence& divergence = kDivergences[args.divergence];
  const Linear& linear = divergence.coefficients;
  const Tail tail = args.tail;
  const bool wants_ce = num.ce != 0 || num.z != 0 || args.stats != nullptr;
  const bool ce_at_own_temperature = wants_ce && num.student_scale != kLog2e;
  const bool restricted = tail == Tail::kRenormalizeBoth;
  const bool no_teacher = tail == Tail::kRenormalize || tail == Tail::kDrop;
  const bool swept = !restricted || wants_ce;
  const bool has_label = args.values_ce(num.ce) && label >= 0 && label < n;
  const double picked = has_label ? double(to_compute(s[label])) : std::numeric_limits<double>::quiet_NaN();
  Row<X> row{s, s, n, head_elements(out, rows.aligned)};
  const int64_t slots = row.slots(), head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  const int64_t label_slot = has_label ? row.slot(label) : 0;

  // The entries, and the teacher's say on all others.
  Entries& entries = Entries::mine();
  int64_t count = 0, outcomes_outside = 0, label_entry = 0;
  double given_mass = 0, log_rest = 0;
  Outside outside;
  double *p = nullptr, *logp = nullptr, *q = nullptr, *logq = nullptr, *value = nullptr, *score = nullptr;
  int64_t* slot_of = nullptr;
  // How the outcomes outside are valued: by the sum of their logits, or each for itself, or by their mass alone.
  bool summed = false, pointwise = false;

  // The scratch: the student's exponentials, x where every outcome is valued, and the exponentials at temperature 1.
  C *es = nullptr, *xs = nullptr, *e1 = nullptr;

  // The student.
  Affine<C> as{}, a1{};
  double z = 0, z_entries = 0, z_outside = 0, z1 = 0, log_z = 0, iq = 0;
  double above_outside = 0;         // sum of the logits outside, each less the reference
  double others1 = 0, e_label = 0;  // at temperature 1: all but the label, and the label
  double student_mass = 0, q_outside = 0, log_q_outside = -kInfinity;
  bool nan = false;      // functors may take a NaN for 0
  bool rebased = false;  // es is relative to the maximum outside

  // The divergence: the sums of values and scores, and the outside's part of the scores.
  double score_outside = 0, score_sum = 0;
  double w = 0;         // omega kd tau / T
  double nan_or_0 = 0;  // added to results of a row that is NaN
  double d = 0;
  double hard = 0, c0 = 0;
  RowResult result;
  GradientTerms<C> terms;

  KDK_INLINE RowResult run() {
    read_entries();
    set_up();
    sweep();
    sum_at_own_temperature();
    normalize();
    evaluate_entries();
    evaluate_all_outside();
    finish_divergence();
    if (wants_ce) add_hard_terms();
    report();
    if (out != nullptr) {
      begin_terms();
      write(gradient_of_entries());
    }
    return result;
  }

  KDK_INLINE void read_entries() {
    with_dtype(args.logprobs.dtype, [&](auto x) {
      const int64_t first = index * args.logprobs.stride_l;
      const auto* logprobs = static_cast<const decltype(x)*>(args.logprobs.data) + first;
      if (args.ids_are_64_bits) {
        entries.read(static_cast<const int64_t*>(args.ids) + first, logprobs, args.entries, n);
      } else {
        entries.read(static_cast<const int32_t*>(args.ids) + first, logprobs, args.entries, n);
      }
    });
    count = entries.count, outcomes_outside = n - count;
    given_mass = entries.mass;
    log_rest = per_row(args.tail_rows, index, std::log(std::max(0.0, 1 - given_mass)), sizeof(C) == 8);
    // This way round a NaN stays.
    if (args.min_tail != 0 || args.tail_rounding != 0)
      log_rest = std::max(log_rest, std::log(args.min_tail + args.tail_rounding * entries.nats()));
    if (count == 0) log_rest = 0;
    outside = resolve_teacher(tail, num.teacher_scale * kLn2, outcomes_outside, log_rest, entries);
    p = entries[Entries::kP], logp = entries[Entries::kLogP];
    q = entries[Entries::kQ], logq = entries[Entries::kLogQ];
    value = entries[Entries::kValue], score = entries[Entries::kScore];
    slot_of = entries.slots.data();
  }

  KDK_INLINE void set_up() {
    // Where the teacher's probability p is the same for all outcomes outside, and the divergence takes q only by p log
    // q, its gradient there is a constant and a multiple of q, and its value takes the sum of the logits.
    const bool uniform = outcomes_outside > 0 && tail == Tail::kUniform;
    summed = uniform && count <= outcomes_outside && linear.c_pq != 0 && linear.c_qp == 0 && linear.c_qq == 0;
    pointwise = (uniform && !summed) || (outcomes_outside > 0 && no_teacher && !divergence.linear_without_teacher);
    prefetch_edges(row, out);
    es = rows.es_of_body - head_slots;
    xs = pointwise ? rows.scratch.get(kEt, slots) : es;
    e1 = ce_at_own_temperature ? rows.place_of_body(kE1) - head_slots : es;
    as = affine<C>(num.student_scale, 0);
  }

  // The student's exponentials: those of all columns in the scratch, of the entries in double, and the sum outside
  // them.
  KDK_INLINE void sweep() {
    sweep_from(false);
    if (z_outside > kFar) sweep_from(true);
    if (!summed) return;
    const double reference = as.logit();
    above_outside = sum_of_logits(s, n, reference);
    for (int64_t k = 0; k < count; ++k) above_outside -= double(to_compute(s[entries.ids[size_t(k)]])) - reference;
  }
  void sweep_from(bool from_maximum) {
    if (swept) {
      z = pointwise ? sweep_student_from<true>(row, n, num.student_scale, from_maximum, as, es, xs, rows.pending)
                    : sweep_student_from<false>(row, n, num.student_scale, from_maximum, as, es, xs, rows.pending);
    }
    const int64_t* const ids = entries.ids.data();
    const double scale = kLn2 * double(as.c), m = double(as.m), r = kLn2 * double(as.r);
    for (int64_t k = 0; k < count; ++k) {
      slot_of[k] = row.slot(ids[k]);
      logq[k] = (double(to_compute(s[ids[k]])) - m) * scale - r;
    }
    z_entries = Entries::exponentials(logq, q, count);
    if (!swept) return;
    for (int64_t k = 0; k < count; ++k) value[k] = double(es[slot_of[k]]);
    const double in_scratch = sum_of_doubles(value, count);
    // Where the entries hold most of the mass, subtracting them would cancel.
    z_outside = count == 0 || std::isnan(z) ? z : z - in_scratch;
    if (count > 0 && !(z_outside > 0.5 * z) && !std::isnan(z)) z_outside = sum_without_entries();
  }
  double sum_without_entries() {
    for (int64_t k = 0; k < count; ++k) es[slot_of[k]] = C(0);
    return sum_of(es, slots);
  }
  // The sum in a scratch, sum, less the label's part of it.
  template <class SumAgain>
  double sum_without_label(C* e, double sum, SumAgain sum_again) {
    const C held = e[label_slot];
    double others = sum - double(held);
    if (others > 0.5 * sum || std::isnan(sum)) return others;
    e[label_slot] = C(0);
    others = sum_again();
    e[label_slot] = held;
    return others;
  }

  // At temperature 1: the label's exponential in double, and the sum of all others, which cross entropy of a sure row
  // is made of.
  KDK_INLINE void sum_at_own_temperature() {
    const auto begin_of_ids = entries.ids.begin();
    label_entry = has_label ? std::find(begin_of_ids, begin_of_ids + count, label) - begin_of_ids : count;
    a1 = as;
    e_label = has_label ? std::exp2(as.scalar(picked)) : 0;
    if (ce_at_own_temperature) {
      for (bool from_maximum = false;; from_maximum = true) {
        const double sum = sweep_student_from<false>(row, n, kLog2e, from_maximum, a1, e1, e1);
        others1 = has_label ? sum_without_label(e1, sum, [&] { return sum_of(e1, slots); }) : sum;
        if (from_maximum || !(others1 > kFar)) break;
      }
      if (has_label) e_label = std::exp2(a1.scalar(picked));
    } else if (has_label && label_entry == count) {
      z_outside = sum_without_label(es, z_outside, [&] { return sum_without_entries(); }) + e_label;
    }
    if (swept) {
      z = z_outside + z_entries;
      log_z = std::log(z);
    }
    if (!ce_at_own_temperature) others1 = z - e_label;
    z1 = ce_at_own_temperature ? others1 + e_label : z;
  }

  // The student's probabilities of the entries, and of all outcomes outside together.
  KDK_INLINE void normalize() {
    student_mass = swept ? z_entries / z : 0;
    nan = entries.invalid || std::isnan(z) || std::isnan(given_mass) || std::isnan(log_rest);
    iq = 1 / z;
    if (restricted) {
      if (!swept) iq = 0;
      double high = -kInfinity;
      for (int64_t k = 0; k < count; ++k) high = std::max(high, logq[k]);
      for (int64_t k = 0; k < count; ++k) logq[k] -= high;
      const double log_sum = std::log(Entries::exponentials(logq, q, count));
      nan = nan || (count > 0 && std::isnan(log_sum));
      for (int64_t k = 0; k < count; ++k) logq[k] -= log_sum;
      Entries::exponentials(logq, q, count);
      return;
    }
    for (int64_t k = 0; k < count; ++k) {
      logq[k] -= log_z;
      q[k] *= iq;
    }
    if (pointwise || outcomes_outside == 0) return;
    log_q_outside = std::log(z_outside) - log_z;
    if (z_outside < 0x1p-90) rebase();
    q_outside = std::exp(log_q_outside);
  }
  // The outcomes outside have left the range of their exponentials: takes these relative to their own maximum.
  KDK_INLINE void rebase() {
    rebased = true;
    C* masked = rows.scratch.get(kOtherRow, n);
    widen_row(s, n, masked, AsIs());
    for (int64_t k = 0; k < count; ++k) masked[entries.ids[size_t(k)]] = -std::numeric_limits<C>::infinity();
    const Affine<C> again = affine<C>(num.student_scale, maximum(masked, n));
    for (int64_t tile = 0; tile < row.tiles(); ++tile) student_exponentials<false>(row, tile, again, es, es);
    z_outside = sum_without_entries();
    log_q_outside = kLn2 * (again.reference() - as.reference()) + std::log(z_outside) - log_z;
    iq = z_outside > 0 ? std::exp(log_q_outside) / z_outside : 0;
  }

  KDK_INLINE void evaluate_entries() {
    int64_t outcomes = count;
    if (tail == Tail::kBucket && outcomes_outside > 0) {
      p[count] = std::exp(outside.log_rest);
      logp[count] = outside.log_rest;
      q[count] = q_outside;
      logq[count] = log_q_outside;
      ++outcomes;
    }
    divergence.f64(linear, num.param0, args.param1, p, logp, 1, q, logq, value, score, outcomes);
    d = sum_of_doubles(value, outcomes);
    score_sum = sum_of_doubles(score, outcomes);
    if (outcomes > count) score_outside = score[count];
  }

  KDK_INLINE void evaluate_all_outside() {
    if (pointwise) {
      evaluate_each_outside();
    } else if (summed && outside.each > 0) {
      evaluate_by_sum_of_logits();
    } else if (no_teacher && outcomes_outside > 0) {
      evaluate_without_teacher();
    }
  }
  double values_in_double(bool none) {
    return values_outside(s, n, none ? divergence.without_teacher_f64 : divergence.f64, linear, num.param0, args.param1,
                          none ? 0.0 : outside.each, none ? -kInfinity : outside.log_each, as, log_z, entries);
  }
  KDK_INLINE void evaluate_each_outside() {
    C* values = rows.scratch.get(kOtherRow, slots);
    double value_outside = 0;
    Evaluate<C> function = divergence.in(C());
    if (no_teacher) function = divergence.without_teacher_in(C());
    evaluate_outside(row, function, linear, num.param0, args.param1, no_teacher ? 0.0 : outside.each,
                     no_teacher ? -kInfinity : outside.log_each, iq, log_z, entries, es, xs, values, value_outside,
                     score_outside);
    if (!std::isfinite(value_outside)) value_outside = values_in_double(no_teacher);
    d += value_outside;
    score_sum += score_outside;
  }
  KDK_INLINE void evaluate_by_sum_of_logits() {
    const double others = double(outcomes_outside);
    if (std::isfinite(above_outside)) {
      const double log_q_sum = kLn2 * double(as.c) * above_outside - others * log_z;
      d += outside.each * (linear.c_pp * others * outside.log_each + linear.c_pq * log_q_sum);
    } else {
      d += values_in_double(false);
    }
    score_outside = others * linear.c_pq * outside.each;
    score_sum += score_outside;
  }
  // Homogeneous of degree 1: f(0, q) = q f(0, 1), and so is the score.
  KDK_INLINE void evaluate_without_teacher() {
    alignas(64) double none[kLanes<double>], log_none[kLanes<double>], one[kLanes<double>], log_one[kLanes<double>],
        f[kLanes<double>], df[kLanes<double>];
    std::fill(none, none + kLanes<double>, 0.0);
    std::fill(log_none, log_none + kLanes<double>, -kInfinity);
    std::fill(one, one + kLanes<double>, 1.0);
    std::fill(log_one, log_one + kLanes<double>, 0.0);
    divergence.f64(linear, num.param0, args.param1, none, log_none, 1, one, log_one, f, df, 1);
    d += f[0] * q_outside;
    score_outside = df[0] * q_outside;
    score_sum += score_outside;
  }

  KDK_INLINE void finish_divergence() {
    w = num.weight * num.kd * num.tau * num.student_scale * kLn2;
    nan_or_0 = nan ? std::numeric_limits<double>::quiet_NaN() : 0;
    d = (outside.known ? d : 0) + nan_or_0;
    if (!outside.known || num.kd == 0 || num.weight == 0) w = 0;
    if (num.kd != 0) result.loss = num.kd * num.tau * d;
  }

  // Relative to the reference of temperature 1: of logits of 1e5 their logarithm would keep two digits. The scale is a
  // rounding of log2 e: differences are taken at it, and the rest is compensated.
  KDK_INLINE void add_hard_terms() {
    const double unit = kLn2 * double(a1.c), top = a1.logit(), lse_above = std::log(z1), lse = top + lse_above / unit;
    double cross_entropy = 0;
    if (args.values_ce(num.ce)) {
      const double smoothing = args.label_smoothing;
      const double hard_label = e_label > others1 ? std::log1p(others1 / e_label) : lse_above - unit * (picked - top);
      if (smoothing != 1) cross_entropy = (1 - smoothing) * hard_label;
      if (smoothing != 0) cross_entropy += smoothing * (lse_above - unit * sum_of_logits(s, n, top) / double(n));
      cross_entropy /= unit;
      if (cross_entropy < 0) cross_entropy = 0;  // by rounding
    }
    if (num.ce != 0) {
      result.loss += num.ce * cross_entropy;
      c0 = -num.weight * num.ce * args.label_smoothing / double(n);
    }
    if (num.z != 0) result.loss += num.z * lse * lse;
    hard = num.weight * (num.ce + 2 * num.z * lse);
    result.stats[1] = cross_entropy;
    result.stats[2] = lse;
  }

  KDK_INLINE void report() {
    result.stats[0] = d;
    result.stats[3] = given_mass + nan_or_0;
    result.stats[4] = student_mass;
    if (args.stats != nullptr) result.stats[5] = nan || !(z > 0) ? std::nan("") : overlap(s, n, entries);
  }

  KDK_INLINE void begin_terms() {
    const double of_outside = w * (score_outside - q_outside * score_sum);
    if (w != 0 && !restricted && !pointwise && !summed && z_outside > 0 && std::abs(of_outside) > 1e30 * z_outside) {
      // A factor that passes the range of C, for exponentials far below 1: they take a power of two of it.
      const double unit = std::exp2(std::nearbyint(std::log2(z_outside)));
      const C over_unit = C(1 / unit);
      for (int64_t j = 0; j < slots; j += kLanes<C>) store(es + j, load<Vec<C>>(es + j) * over_unit);
      iq *= unit, z_outside /= unit;
      rebased = true;
    }
    terms.es = es;
    terms.et = xs;
    terms.array = e1;
    terms.c0 = c0;
    terms.two_models = false;
    if (w != 0 && !restricted) {
      if (pointwise) {
        // The scores, in the teacher's place.
        terms.two_models = true;
        terms.b = -w;
        terms.a = -w * iq * score_sum;
      } else if (summed) {
        terms.c0 += w * linear.c_pq * outside.each;
        terms.a = -w * iq * score_sum;
      } else if (!(z_outside <= 0)) {
        terms.a = of_outside / z_outside;
      }
    }
    if (hard == 0) return;
    if (ce_at_own_temperature) {
      terms.extra = Extra::kArray;
      terms.c1 = hard / z1;
    } else {
      terms.a += hard * iq;
    }
  }

  // The gradient of the entries, before the student may be overwritten; the place of their values is free now.
  KDK_INLINE double* gradient_of_entries() {
    double* g = value;
    if (w != 0) {
      for (int64_t k = 0; k < count; ++k) g[k] = c0 + w * (score[k] - q[k] * score_sum);
    } else {
      std::fill(g, g + count, c0);
    }
    // By the scale that z1 was made with: of a logit of 1e4, e^(s - lse) was off by 6e-5.
    if (hard != 0)
      for (int64_t k = 0; k < count; ++k)
        g[k] += hard * std::exp2(a1.scalar(to_compute(s[entries.ids[size_t(k)]]))) / z1;
    if (has_label) {
      const double step = num.weight * num.ce * (1 - args.label_smoothing);
      if (label_entry == count) {
        // One more entry, past the bucket's; by its exponential in double.
        entries.ids[size_t(count)] = label;
        slot_of[count] = label_slot;
        g[count] = gradient_at(row, terms, label, 0, 0);
        if (ce_at_own_temperature) {
          g[count] += (e_label - double(e1[label_slot])) * terms.c1;
        } else if (!rebased) {
          g[count] += (e_label - double(es[label_slot])) * terms.a;
        }
        ++entries.count;
      }
      g[label_entry] -= step;
    }
    if (nan_or_0 != 0 && num.kd != 0)
      for (int64_t k = 0; k < entries.count; ++k) g[k] += nan_or_0;
    return g;
  }

  // Writes the gradient, of the entries g.
  KDK_INLINE void write(const double* g) {
    const bool reads_scratch = terms.a != 0 || terms.two_models || terms.extra == Extra::kArray || std::isnan(terms.a);
    if (reads_scratch && put_in_scratch(terms, entries, g)) {
      rows.write(row, terms, out, rows.deferred && !pointwise, -1, 0);
      return;
    }
    if (reads_scratch || terms.c0 != 0) {
      write_gradient(row, terms, out, rows.streamed);
    } else {
      fill_zero(out, 0, n);
    }
    for (int64_t k = 0; k < entries.count; ++k) from_compute(C(g[k]), out + entries.ids[size_t(k)]);
  }
};

template <class X>
RowResult SparseRows<X>::add(const RowNumbers& num, int64_t index, const X* s, int64_t label, X* out) {
  return SparseRow<X>{*this, num, index, s, label, out}.run();
}

template <class X>
void rows_direct(const TopkArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  SparseRows<X> rows(args, streams(args, sizeof(X), kDefers<X>), kDefers<X>);
  run_rows<X>(rows, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    const RowResult result = rows.add(row_numbers<C>(args, row, weight), row, rows.student(row, out), label, out);
    put_stats<C, kTopkStats>(args, row, result);
    return result.loss;
  });
}

// With a softcap: the row is capped in C first, and the gradient taken back through the cap.
template <class X>
void rows_capped(const TopkArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  const int64_t n = args.columns;
  SparseRows<C> rows(args, false, false);
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t label, double weight, X* out) {
    Scratch<C>& scratch = Scratch<C>::mine();
    C *s = scratch.get(kStudentRow, n), *g = out == nullptr ? nullptr : scratch.get(kGradientRow, n);
    capped_row(args.student, row, args.length, n, args.student_softcap, s, AsIs());
    const RowResult result = rows.add(row_numbers<C>(args, row, weight), row, s, label, g);
    if (g != nullptr) {
      const C inverse = C(1 / args.student_softcap);
      narrow_row(n, out, [&](int64_t j) KDK_LAMBDA_INLINE {
        return load<Vec<C>>(g + j) * slope_of_cap(load<Vec<C>>(s + j), inverse);
      });
    }
    put_stats<C, kTopkStats>(args, row, result);
    return result.loss;
  });
}

}  // namespace topk

template <class X>
void topk_rows(const TopkArgs& args, int64_t begin, int64_t end) {
  return args.student_softcap != 0 ? topk::rows_capped<X>(args, begin, end) : topk::rows_direct<X>(args, begin, end);
}

}  // namespace KDK_ISA
}  // namespace kdk
