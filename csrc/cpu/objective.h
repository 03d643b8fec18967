// One row of a divergence with cross entropy and z-loss: swept, valued, and its gradient written or left to be written
// with the next row.
#pragma once

#include "call.h"
#include "divergence_list.h"
#include "near.h"
#include "numbers.h"
#include "student.h"
#include "value.h"

#include <vector>

namespace kdk {
inline namespace KDK_ISA {

// The exponentials at temperature 1, for cross entropy and z-loss: those at T, which at T = 2, 3 and 4 are powers of
// them, or their own.
enum class CeSource { kNone, kSame, kSquare, kCube, kFourth, kOwn };
constexpr int power_of(CeSource ce) {
  return ce == CeSource::kSquare ? 2 : ce == CeSource::kCube ? 3 : ce == CeSource::kFourth ? 4 : 1;
}
constexpr Extra extra_of(CeSource ce) {
  return ce == CeSource::kSquare   ? Extra::kSquare
         : ce == CeSource::kCube   ? Extra::kCube
         : ce == CeSource::kFourth ? Extra::kFourth
         : ce == CeSource::kOwn    ? Extra::kArray
                                   : Extra::kNone;
}
inline CeSource ce_source(double student_scale) {
  for (const CeSource ce : {CeSource::kSame, CeSource::kSquare, CeSource::kCube, CeSource::kFourth}) {
    if (student_scale == kLog2e / power_of(ce)) return ce;
  }
  return CeSource::kOwn;
}

inline Sums sums_for(const DenseArgs& args) {
  const Divergence& divergence = kDivergences[args.divergence];
  const Linear& k = divergence.coefficients;
  const bool entropies = k.c_pp + k.c_pq != 0 || k.c_qp + k.c_qq != 0;
  if (args.stats != nullptr) return divergence.linear && k.c_qp != 0 && !entropies ? kAllKept : kAll;
  if (!divergence.linear) return kNoSums;
  if (k.c_qp == 0 && k.c_qq == 0) return entropies ? kForwardAndTeacher : kForward;
  if (entropies) return kAll;
  return k.c_pq == 0 ? kReverse : kBoth;
}

template <class C>
double accepted(const C* es, const C* et, int64_t count, double iq, double ip) {
  const C ratio = C(ip / iq);
  double total = 0;
  for (int64_t j = 0; j < count;) {
    Vec<C> sum = {};
    for (const int64_t end = std::min(count, j + kTileElements); j < end; j += kLanes<C>)
      sum += min_of(load<Vec<C>>(es + j), load<Vec<C>>(et + j) * ratio);
    total += horizontal_sum<C>(sum);
  }
  return total * iq;
}

// -log of the acceptance rate 1 - d, which counts as no less than floor, and its derivative by d.
struct Outside {
  double value, slope;
};
inline Outside negative_log_acceptance(double d, double accepted, double floor) {
  if (std::isnan(d)) return {d, d};
  // Near 1 the rate is known by what it lacks, near 0 by itself.
  const double rate = d < 0.5 ? 1 - d : accepted;
  if (!(rate > floor)) return {-std::log(floor), 1 / floor};
  return {d < 0.5 ? -std::log1p(-d) : -std::log(rate), 1 / rate};
}
// With more mass than this, which no normaliser of all its columns gives, a teacher's distance would be a difference of
// two large numbers: what is not accepted is taken from what is.
constexpr double kMassOfAll = 2;
// The sum of x log x and x d of a teacher of which only a mass of x is in these columns, where d is its divergence as a
// distribution: of_log is 1 for a divergence that has p log p, else 0.
inline double of_mass(double d, double mass, double of_log) {
  return mass > 0 ? mass * (d + (of_log != 0 ? of_log * std::log(mass) : 0)) : mass * d;
}

// log_z less the smoothed logit of the label, both relative to a reference: the logarithm of a sum of exponentials and
// a logit that share a large part would lose the difference.
template <class X>
double cross_entropy_of(const X* s, int64_t n, int64_t label, double smoothing, double reference, double log_z) {
  const bool inside = label >= 0 && label < n;
  const double picked = inside ? double(to_compute(s[label])) : std::numeric_limits<double>::quiet_NaN();
  // Smoothing 1 gives the label no part, and smoothing 0 none to the mean: 0 * inf must not make a NaN.
  double cross_entropy = log_z;
  if (smoothing != 1) cross_entropy -= (1 - smoothing) * (picked - reference);
  if (smoothing != 0) cross_entropy -= smoothing * sum_of_logits(s, n, reference) / double(n);
  return cross_entropy;
}

// The rows of one call, one after the other.
template <class X, class Y = X>
struct ObjectiveRows : CallRows<DenseArgs, X> {
  using Base = CallRows<DenseArgs, X>;
  using C = typename Io<X>::C;
  using Base::args, Base::n;
  const Divergence& divergence = kDivergences[args.divergence];
  const Sums sums_needed = sums_for(args);
  C* const es_of_body = Base::place_of_body(kEs);
  C* const et_of_body = Base::place_of_body(kEt);
  bool masking = false;  // set where a row needs it
  SeedsAhead<X, Y> ahead = {};

  // Aligned to the gradient's cache lines: across them, rows of 1,000 in place take 15 % longer.
  ObjectiveRows(const DenseArgs& arguments, bool streams, bool defers)
      : Base(arguments, streams, defers, streams || arguments.columns * int64_t(sizeof(X)) >= kStreamRowBytes) {}

  // Student and teacher of one row; the gradient goes to out (null: none), the acceptance rate to where it is known.
  RowResult add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out, C* acceptance);
  RowResult add_exactly(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out);
  RowResult add_constant(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out);
};

// See exact_row.h.
RowResult exact_row(const DenseArgs& args, const RowNumbers& num, double* s, double* t, double top_logit, int64_t label,
                    double* g);

template <class X, class Y>
__attribute__((noinline)) RowResult ObjectiveRows<X, Y>::add_exactly(const RowNumbers& num, const X* s, const Y* t,
                                                                     int64_t label, X* out) {
  static thread_local std::vector<double> room;
  const size_t width = size_t(n + kLanes<double>);
  room.resize(3 * width);
  double *const ds = room.data(), *const dt = ds + width, *const g = out == nullptr ? nullptr : dt + width;
  const double high_s = maximum(s, n), high_t = maximum(t, n);
  for (int64_t j = 0; j < n; ++j) ds[j] = double(to_compute(s[j])) - high_s;
  for (int64_t j = 0; j < n; ++j) dt[j] = double(to_compute(t[j])) - high_t;
  RowNumbers relative = num;
  relative.teacher_lse -= high_t * kLn2 * num.teacher_scale;
  const RowResult result = exact_row(args, relative, ds, dt, high_s, label, g);
  for (int64_t j = 0; g != nullptr && j < n; ++j) from_compute(C(g[j]), out + j);
  return result;
}

// One row, in phases.
template <class X, class Y>
struct ObjectiveRow {
  using C = typename Io<X>::C;
  ObjectiveRows<X, Y>& rows;
  const RowNumbers& num;
  const X* s;
  const Y* t;
  int64_t label;
  X* out;
  C* acceptance;

  const DenseArgs& args = rows.args;
  const int64_t n = rows.n;
  const Divergence& divergence = rows.divergence;
  const Linear& linear = divergence.coefficients;
  const Sums sums_needed = rows.sums_needed;
  Row<X, Y> row{s, t, n, head_elements(out, rows.aligned)};
  const int64_t head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  const bool wants_ce = num.ce != 0 || num.z != 0 || args.stats != nullptr;
  const CeSource ce = wants_ce ? ce_source(num.student_scale) : CeSource::kNone;
  const bool own = ce == CeSource::kOwn;
  const int power = power_of(ce);
  const bool keeps_powers = power > 1 && has_logs(divergence) && out != nullptr;

  // The scratch: exponentials of student and teacher, those of the student at temperature 1, and the terms of a reverse
  // KL for its gradient.
  C *const es = rows.es_of_body - head_slots, *const et = rows.et_of_body - head_slots;
  C* const e1 = own || keeps_powers ? rows.place_of_body(kE1) - head_slots : es;
  C* const reverse_terms = sums_needed & kKept ? rows.place_of_body(kTerms) - head_slots : es;

  // Of the sweep.
  Affine<C> as{}, at{}, a1{};
  RowSums sums;
  double z1 = 0;
  bool unclamped = false;
  // Of its sums; the two KLs in nats.
  double log2_zs = 0, log2_zt = 0, iq = 0, ip = 0, kl_forward = 0, kl_reverse = 0;
  bool equal = false;
  double d = 0, distance = 0;
  bool apart = false;
  // The teacher is normalised elsewhere; its mass here. The acceptance rate, of divergences that are made of it.
  const bool elsewhere = args.teacher_lse.data != nullptr;
  double mass = 1, rate = 0;
  GradientTerms<C> terms;
  RowResult result;

  KDK_INLINE RowResult run() {
    prefetch_edges(row, out);
    sweep();
    rows.ahead.find(n);
    take_sums();
    if (args.stats != nullptr) take_statistics();
    begin_terms();
    if (divergence.linear) {
      take_linear();
    } else {
      take_general();
    }
    // With less mass than 1 a KL may be below 0.
    d = equal ? 0 : elsewhere && !divergence.linear ? d : at_least_0(d);
    if (needs_double()) return rows.add_exactly(num, s, t, label, out);
    if (elsewhere || divergence.outer != Outer::kNone) apply_outer();
    weigh_divergence();
    if (wants_ce) add_hard_terms();
    result.stats[0] = d;
    if (out != nullptr) {
      use_reverse_terms();
      write();
    }
    return result;
  }

  // Exponentials, and their sums relative to references that keep them in range.
  KDK_INLINE void sweep() {
    const double limit = power == 1 ? kLargestSum : std::pow(kLargestSum, 1.0 / power);
    const auto from = [&](const Seeds& seeds, bool from_maxima) KDK_LAMBDA_INLINE {
      for (;;) {
        const bool in_range = sweep_tiles(seeds, from_maxima, limit);
        // The pending gradient goes with the first sweep, from its first block on.
        rows.pending.finish();
        // Mass where the other model has none is infinitely far; where neither has any, its logits are masked.
        const bool kl_is_nan = std::isnan(sums.forward) || std::isnan(sums.reverse);
        if (!in_range || !kl_is_nan || rows.masking || std::isnan(sums.zs) || std::isnan(sums.zt)) return in_range;
        rows.masking = true;
      }
    };
    sweep_in_range(rows.ahead.of(s, t, n), from, [&] { return Seeds{maximum(s, n), maximum(t, n)}; });
    if (ce == CeSource::kSame) z1 = sums.zs;
  }

  KDK_INLINE bool sweep_tiles(const Seeds& seeds, bool from_maxima, double limit) {
    as = affine<C>(num.student_scale, seeds.s);
    at = affine<C>(num.teacher_scale, seeds.t);
    if (own) a1 = affine<C>(kLog2e, seeds.s);
    sums = RowSums();
    z1 = 0;
    unclamped = true;
    bool own_unclamped = true, in_range = true;
    // Without a gradient nothing reads the exponentials again: every tile lands on the first one's place.
    const bool whole_row = out != nullptr || !divergence.linear || args.stats != nullptr;
    for (int64_t tile = 0; tile < row.tiles() && in_range; ++tile) {
      const int64_t back = whole_row ? 0 : tile * kTileElements;
      visit_sums(sums_needed, [&](auto made) {
        sweep_tile<decltype(made)::value>(row, tile, as, at, es - back, et - back, reverse_terms - back, unclamped,
                                          rows.masking, sums, rows.pending);
      });
      if (power > 1) {
        const auto [first, last] = tile_slots(row, tile);
        C* const tile_es = es - back + first;
        z1 += sum_of_powers(power, tile_es, keeps_powers ? e1 + first : tile_es, last - first);
      }
      if (own) {
        z1 += student_exponentials<false>(row, tile, a1, e1 - back, e1 - back, own_unclamped, kNothingPending);
      }
      in_range = from_maxima || !(sums.zs > limit || sums.zt > limit || z1 > kLargestSum);
    }
    return in_range;
  }

  KDK_INLINE void take_sums() {
    log2_zs = std::log2(sums.zs), log2_zt = std::log2(sums.zt);
    iq = 1 / sums.zs, ip = 1 / sums.zt;
    kl_forward = kLn2 * (sums.forward * ip - log2_zt + log2_zs);
    kl_reverse = kLn2 * (sums.reverse * iq - log2_zs + log2_zt);
    if (elsewhere) {
      const double log2_z = kLog2e * num.teacher_lse - at.reference();
      mass = std::exp2(log2_zt - log2_z);
      // Terms that are linear in p are made of the distribution, and of the mass: see of_mass.
      if (!divergence.linear) log2_zt = log2_z, ip = std::exp2(-log2_z);
    }
    // Of one model and itself nothing is left but the rounding, unless the entropy is asked for as well.
    if constexpr (std::is_same_v<X, Y>) {
      equal = num.kd != 0 && !elsewhere && args.stats == nullptr && num.student_scale == num.teacher_scale &&
              std::isfinite(sums.zs) && sums.zs > 0 && std::memcmp(s, t, size_t(n) * sizeof(X)) == 0 &&
              (!divergence.linear || (linear.c_pp + linear.c_pq == 0 && linear.c_qp + linear.c_qq == 0));
    }
  }

  // The sums p logp and q logq in nats.
  KDK_INLINE double p_logp() const { return kLn2 * (sums.teacher * ip - log2_zt); }
  KDK_INLINE double q_logq() const { return kLn2 * (sums.student * iq - log2_zs); }

  // A general divergence overwrites the teacher's exponentials before the gradient is written.
  KDK_INLINE bool accepts_with_gradient() const { return out != nullptr && divergence.linear && num.kd != 0; }

  KDK_INLINE void take_statistics() {
    result.stats[3] = at_least_0(kl_forward);
    result.stats[4] = at_least_0(kl_reverse);
    result.stats[5] = at_least_0(-p_logp());
    result.stats[6] = at_least_0(-q_logq());
    result.stats[7] = same_maximum(row, sums.best_tile_s, sums.best_tile_t, n);
    if (!accepts_with_gradient()) result.stats[8] = accepted(es, et, row.slots(), iq, ip);
  }

  KDK_INLINE void begin_terms() {
    terms.as = as;
    terms.at = at;
    terms.es = es;
    terms.et = et;
    terms.array = e1;
    distance = sums_needed & kForward ? kl_forward : kl_reverse;
  }
  // omega kd tau / T
  KDK_INLINE double weight_of_divergence() const { return num.weight * num.kd * num.tau * num.student_scale * kLn2; }

  KDK_INLINE void take_linear() {
    const double f = weight_of_divergence();
    const Linear& k = linear;
    // Terms whose coefficient is 0 may be infinite.
    if (k.c_pp + k.c_pq != 0) d += (k.c_pp + k.c_pq) * p_logp();
    if (k.c_pq != 0) d -= k.c_pq * kl_forward;
    double over_q = 0;  // sum q (c_qp logp + c_qq logq)
    if (k.c_qp + k.c_qq != 0) over_q += (k.c_qp + k.c_qq) * q_logq();
    if (k.c_qp != 0) over_q -= k.c_qp * kl_reverse;
    d += over_q;
    const double score_sum = k.c_pq + k.c_qq + over_q;
    terms.b = -f * ip * k.c_pq;
    terms.a = f * iq * (k.c_qq - score_sum);
    terms.logs = has_logs(divergence);
    if (terms.logs) {
      terms.a -= f * iq * kLn2 * (k.c_qp * log2_zt + k.c_qq * log2_zs);
      terms.ks = f * iq * kLn2 * k.c_qq;
      terms.kst = f * iq * kLn2 * (k.c_qp + k.c_qq);
    }
  }

  KDK_INLINE void take_general() {
    const double f = weight_of_divergence();
    // A NaN logit makes the whole row NaN, and a row of -inf has no distribution; functors see neither.
    double score_sum = !(sums.zs > 0 && sums.zt > 0) ? std::numeric_limits<double>::quiet_NaN() : 0;
    d = score_sum;
    const Vec<C> zero = {};
    const auto& tiles = ValueTable<X, Y>::kDivergences[args.divergence];
    const auto value_of_tile = unclamped && as.in_exp_range(at) ? tiles.guarded : tiles.any;
    const bool wanted = (num.kd != 0 || args.stats != nullptr) && !equal;
    double param0 = num.param0;
    const bool crowded = elsewhere && mass > kMassOfAll && divergence.outer != Outer::kHybrid;
    if ((divergence.outer != Outer::kNone || crowded) && wanted) {
      rate = accepted(es, et, row.slots(), iq, ip);
      if (divergence.outer == Outer::kHybrid) param0 = std::exp(-num.param0 * rate);
    }
    const Params<Vec<C>> params{zero + C(param0), zero + C(args.param1), zero + C(1 - param0)};
    for (int64_t tile = 0; tile < row.tiles() && wanted && !std::isnan(score_sum); ++tile)
      value_of_tile(row, tile, as, at, log2_zs, log2_zt, params, es, et, d, score_sum);
    // Outcomes that are not here have none of the student's mass.
    if (crowded) {
      d = 1 - rate + 0 * d;
    } else if (elsewhere) {
      d += (divergence.outer == Outer::kHybrid ? 1 - param0 : 1) * 0.5 * (1 - mass);
    }
    apart = score_sum > (1 - kNearlyEqual) * tiles.limit(num.param0);
    distance = tiles.as_forward_kl(d, num.param0);
    terms.b = -f;
    terms.a = -f * iq * score_sum;
  }

  // True where the type of the sums keeps too little of the row; see near.h.
  KDK_INLINE bool needs_double() const {
    if (!(num.kd != 0 && sums.zs > 0 && sums.zt > 0 && !equal)) return false;
    const bool near = (divergence.linear ? distance : d) < kNearlyEqual;
    const bool may_agree = near || (linear.c_pq != 0 && linear.c_qp != 0 && distance < kNearForBoth);
    // Of forward KL's gradient the teacher's part stays. Nothing was added up of most there.
    const bool vanishes = sums.most >= (1 - kSure) * sums.zs;
    bool exactly = !std::isfinite(d) || apart;
    if (!exactly && (may_agree || vanishes)) {
      const Peaks<X> peaks(s, n);
      const double top = std::exp2(as.scalar(peaks.highest));
      exactly = (near && !kFused) || sums.zs - top < (near ? kFairlySure : kSure) * sums.zs;
      if (!exactly && may_agree && top > kTop * sums.zs) {
        exactly = distance < kAlike || agree(row, peaks, as, at, log2_zs, log2_zt, top * iq, distance);
      }
    }
    return exactly && std::isfinite(sums.zs) && std::isfinite(sums.zt);
  }

  KDK_INLINE void apply_outer() {
    double factor = 1;
    if (elsewhere && divergence.linear) {
      d = of_mass(d, mass, linear.c_pp);
      factor = mass;
    }
    if (divergence.outer == Outer::kNegativeLog) {
      const Outside outside = negative_log_acceptance(d, rate, num.param0);
      d = outside.value;
      factor = outside.slope;
    }
    terms.a *= factor, terms.b *= factor;
  }

  KDK_INLINE void weigh_divergence() {
    if (num.kd != 0) result.loss = num.kd * num.tau * d;
    if (num.kd == 0 || num.weight == 0 || equal) {
      terms.a = terms.b = terms.ks = terms.kst = 0;
      terms.logs = false;
    }
    // Left out: et may be NaN, of the teacher or of an infinite score, and 0 times that would still be NaN.
    if (num.kd == 0 && out != nullptr && !(divergence.linear && std::isfinite(sums.zt)))
      std::fill(et, et + row.slots(), C(0));
  }

  // Cross entropy and z-loss, or their statistics.
  KDK_INLINE void add_hard_terms() {
    const Affine<C>& base = own ? a1 : as;
    const double log_z = kLn2 * std::log2(z1), reference = base.logit(), lse = reference + log_z;
    double cross_entropy = 0;
    if (args.values_ce(num.ce)) cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, reference, log_z);
    if (num.ce != 0) {
      result.loss += num.ce * cross_entropy;
      terms.c0 = -num.weight * num.ce * args.label_smoothing / double(n);
    }
    if (num.z != 0) result.loss += num.z * lse * lse;
    const double c1 = num.weight * (num.ce + (num.z != 0 ? 2 * num.z * lse : 0)) / z1;
    if (num.ce == 0 && num.z == 0) {
      // For the statistics alone.
    } else if (ce == CeSource::kSame) {
      terms.a += c1;
    } else if (c1 != 0) {
      terms.extra = keeps_powers ? Extra::kArray : extra_of(ce);
      terms.c1 = c1;
    }
    result.stats[1] = cross_entropy;
    result.stats[2] = lse;
  }

  // Takes the place of the logarithms where es (xs - xt) is there, but for scale and references: in et, or in an array
  // of its own where cross entropy has none.
  KDK_INLINE void use_reverse_terms() {
    const bool in_et = sums_needed == kReverse;
    const bool in_array = (sums_needed & kKept) != 0 && terms.extra == Extra::kNone;
    if (!(kFused && std::is_same_v<C, float> && terms.logs && (in_et || in_array) && unclamped && as.in_exp_range(at)))
      return;
    terms.a -= terms.ks * (as.reference() - at.reference());
    if (in_et) {
      terms.b = terms.ks * double(as.c);
    } else {
      terms.extra = Extra::kArray;
      terms.array = reverse_terms;
      terms.c1 = -terms.ks * double(as.c);
    }
    terms.ks = 0;
    terms.logs = false;
  }

  KDK_INLINE void write() {
    const bool has_label = num.ce != 0 && label >= 0 && label < n;
    // Read before the gradient may overwrite the student.
    const double xs = has_label && terms.logs ? as.scalar(to_compute(s[label])) : 0;
    const double xt = has_label && terms.logs ? at.scalar(to_compute(t[label])) : 0;
    double accepted_sum = 0;
    if (args.stats != nullptr && accepts_with_gradient()) {
      terms.accepted = &accepted_sum;
      terms.ratio = ip / iq;
    }
    double at_label = 0;
    if (has_label) at_label = gradient_at(row, terms, label, xs, xt) - num.weight * num.ce * (1 - args.label_smoothing);
    const bool later = rows.deferred && may_pend_beside(sums_needed, terms);
    rows.write(row, terms, out, later, has_label ? label : -1, at_label, acceptance, iq);
    if (!later && terms.accepted != nullptr) result.stats[8] = accepted_sum * iq;
  }
};

// Of a teacher that is normalised elsewhere: all of its mass is there.
template <class Y>
bool has_nothing(const Y* t, int64_t n) {
  return std::all_of(t, t + n, [](Y x) { return to_compute(x) == -std::numeric_limits<float>::infinity(); });
}

// The divergence of such a row is a constant: no sums are made of infinities.
template <class X, class Y>
__attribute__((noinline)) RowResult ObjectiveRows<X, Y>::add_constant(const RowNumbers& num, const X* s, const Y* t,
                                                                      int64_t label, X* out) {
  RowNumbers others = num;
  others.kd = 0;
  RowResult result = add(others, s, t, label, out, nullptr);
  const bool tvd = !divergence.linear && divergence.outer == Outer::kNone;
  const double d = divergence.outer == Outer::kNegativeLog ? -std::log(num.param0) : tvd ? 1 : 0;
  result.loss += num.kd * num.tau * d;
  return result;
}

template <class X, class Y>
RowResult ObjectiveRows<X, Y>::add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out,
                                   C* acceptance) {
  if (args.teacher_lse.data != nullptr && num.kd != 0 && has_nothing(t, n)) return add_constant(num, s, t, label, out);
  return ObjectiveRow<X, Y>{*this, num, s, t, label, out, acceptance}.run();
}

}  // namespace KDK_ISA
}  // namespace kdk
