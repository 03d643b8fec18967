// One row of a divergence with cross entropy and z-loss: swept, valued, and its gradient written or left to be written
// with the next row.
#pragma once

#include "divergence_list.h"
#include "near.h"
#include "numbers.h"
#include "rows.h"
#include "scratch.h"
#include "student.h"
#include "value.h"

#include <vector>

namespace kdk {
inline namespace KDK_ISA {

inline CeSource ce_source(double student_scale) {
  for (const CeSource ce : {kCeSame, kCeSquare, kCeCube, kCeFourth}) {
    if (student_scale == kLog2e / power_of(ce)) return ce;
  }
  return kCeOwn;
}

inline Sums sums_for(const DenseArgs& args) {
  const Divergence& divergence = kDivergences[args.divergence];
  const Linear& k = divergence.coefficients;
  const bool entropies = k.c_pp + k.c_pq != 0 || k.c_qp + k.c_qq != 0;
  if (args.stats != nullptr) return divergence.linear && k.c_qp != 0 && !entropies ? kAllKept : kAll;
  if (!divergence.linear) return kNoSums;
  if (k.c_qp == 0 && k.c_qq == 0) return entropies ? kSoft : kForward;
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
struct ObjectiveRows {
  using C = typename Io<X>::C;
  const DenseArgs& args;
  // Whether gradients go around the caches, and whether one may be written with the next row or by finish(): its memory
  // must be there till then.
  const bool streamed, deferred;
  // To the gradient's cache lines: across them, rows of 1,000 in place take 15 % longer.
  const bool aligned = streamed || args.columns * int64_t(sizeof(X)) >= kStreamRowBytes;
  int64_t n = args.columns;
  const Divergence& divergence = kDivergences[args.divergence];
  const Sums sums_needed = sums_for(args);
  Scratch<C>& scratch = Scratch<C>::mine();
  // With a block for either edge; what is pending is read where the next row goes, so the body begins in one place.
  C* const es_of_body = scratch.get(kEs, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  C* const et_of_body = scratch.get(kEt, n + 2 * Row<X>::kBlock) + Row<X>::kBlock;
  bool masking = false;  // set where a row needs it
  SeedsAhead<X, Y> ahead = {};
  Pending<X> pending = {};

  ObjectiveRows(const DenseArgs& arguments, bool streams, bool defers)
      : args(arguments), streamed(streams), deferred(defers) {}

  // Student and teacher of one row; the gradient goes to out (null: none), the acceptance rate to where it is known.
  RowResult add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out, C* acceptance);
  RowResult add_exactly(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out);
  void finish() { pending.finish(); }
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
  const RowResult result = exact_row(args, num, ds, dt, high_s, label, g);
  for (int64_t j = 0; g != nullptr && j < n; ++j) from_compute(C(g[j]), out + j);
  return result;
}

template <class X, class Y>
RowResult ObjectiveRows<X, Y>::add(const RowNumbers& num, const X* s, const Y* t, int64_t label, X* out,
                                   C* acceptance) {
  Row<X, Y> row(s, t, n, head_elements(out, aligned));
  prefetch_edges(row, out);
  const bool whole_row = out != nullptr || !divergence.linear || args.stats != nullptr;
  const int64_t head_slots = row.head > 0 ? Row<X>::kBlock : 0;
  C *es = es_of_body - head_slots, *et = et_of_body - head_slots;

  const bool wants_ce = num.ce != 0 || num.z != 0 || args.stats != nullptr;
  CeSource ce = kCeNone;
  if (wants_ce) ce = ce_source(num.student_scale);
  const int power = power_of(ce);
  const bool keeps_powers = power > 1 && has_logs(divergence) && out != nullptr;
  C* e1 = es;
  const auto another = [&](ScratchUse use) {
    return scratch.get(use, n + 2 * Row<X>::kBlock) + Row<X>::kBlock - head_slots;
  };
  if (ce == kCeOwn || keeps_powers) e1 = another(kE1);
  C* const kept = sums_needed & kKept ? another(kTerms) : es;

  auto [max_s, max_t] = ahead.of(s, t, n);
  Affine<C> as, at, a1{};
  RowSums sums;
  double z1 = 0;
  const double limit = power == 1 ? kRedo : std::pow(kRedo, 1.0 / power);
  bool trusting = false;
  for (bool from_maximum = false;;) {
    as = affine<C>(num.student_scale, max_s);
    at = affine<C>(num.teacher_scale, max_t);
    if (ce == kCeOwn) a1 = affine<C>(kLog2e, max_s);
    sums = RowSums();
    z1 = 0;
    bool redo = false, own_trusting = true;
    trusting = true;
    for (int64_t tile = 0; tile < row.tiles() && !redo; ++tile) {
      // Without a gradient nothing reads the exponentials again: every tile lands on the first one's place.
      C* tile_es = whole_row ? es : es - tile * kTileElements;
      C* tile_et = whole_row ? et : et - tile * kTileElements;
      C* tile_e1 = whole_row ? e1 : e1 - tile * kTileElements;
      C* tile_kept = whole_row ? kept : kept - tile * kTileElements;
      const auto sweep = [&](auto made) {
        sweep_tile<made>(row, tile, as, at, tile_es, tile_et, tile_kept, trusting, masking, sums, pending);
      };
      switch (sums_needed) {
        case kNoSums: sweep(std::integral_constant<int, kNoSums>()); break;
        case kForward: sweep(std::integral_constant<int, kForward>()); break;
        case kReverse: sweep(std::integral_constant<int, kReverse>()); break;
        case kBoth: sweep(std::integral_constant<int, kBoth>()); break;
        case kSoft: sweep(std::integral_constant<int, kSoft>()); break;
        case kAllKept: sweep(std::integral_constant<int, kAllKept>()); break;
        default: sweep(std::integral_constant<int, kAll>()); break;
      }
      if (power > 1) {
        const auto [first, last] = tile_slots(row, tile);
        z1 += sum_of_powers(power, tile_es + first, keeps_powers ? e1 + first : tile_es + first, last - first);
      }
      if (ce == kCeOwn) {
        z1 += student_exponentials<false>(row, tile, a1, tile_e1, tile_e1, own_trusting, kNothingPending);
      }
      redo = !from_maximum && (sums.zs > limit || sums.zt > limit || z1 > kRedo);
    }
    const bool broken = std::isnan(sums.forward) || std::isnan(sums.reverse);
    if (!redo && broken && !masking && !std::isnan(sums.zs) && !std::isnan(sums.zt)) {
      masking = true;
      redo = true;
    } else if (redo) {
      from_maximum = true;
      max_s = maximum(s, n);
      max_t = maximum(t, n);
    }
    // What is pending goes with the first sweep, from its first block on.
    pending.finish();
    if (!redo) break;
  }
  if (ce == kCeSame) z1 = sums.zs;
  ahead.find(n);

  const double log2_zs = std::log2(sums.zs), log2_zt = std::log2(sums.zt);
  const double iq = 1 / sums.zs, ip = 1 / sums.zt;
  // In nats: the two KLs and the sums p logp, q logq.
  const double kl_forward = kLn2 * (sums.forward * ip - log2_zt + log2_zs);
  const double kl_reverse = kLn2 * (sums.reverse * iq - log2_zs + log2_zt);
  const double p_logp = kLn2 * (sums.teacher * ip - log2_zt), q_logq = kLn2 * (sums.student * iq - log2_zs);
  // Of one model and itself nothing is left but the rounding, unless the entropy is asked for as well.
  bool equal = false;
  if constexpr (std::is_same_v<X, Y>) {
    const Linear& k = divergence.coefficients;
    equal = num.kd != 0 && args.stats == nullptr && num.student_scale == num.teacher_scale && std::isfinite(sums.zs) &&
            sums.zs > 0 && std::memcmp(s, t, size_t(n) * sizeof(X)) == 0 &&
            (!divergence.linear || (k.c_pp + k.c_pq == 0 && k.c_qp + k.c_qq == 0));
  }

  RowResult result;
  // A general divergence overwrites the teacher's exponentials before the gradient is written.
  const bool with_gradient = out != nullptr && divergence.linear && num.kd != 0;
  if (args.stats != nullptr) {
    result.stats[3] = at_least_0(kl_forward);
    result.stats[4] = at_least_0(kl_reverse);
    result.stats[5] = at_least_0(-p_logp);
    result.stats[6] = at_least_0(-q_logq);
    result.stats[7] = same_maximum(row, sums.best_tile_s, sums.best_tile_t, n);
    if (!with_gradient) result.stats[8] = accepted(es, et, row.slots(), iq, ip);
  }

  const double f = num.weight * num.kd * num.tau * num.student_scale * kLn2;  // omega kd tau / T
  GradientTerms<C> terms;
  terms.as = as;
  terms.at = at;
  terms.es = es;
  terms.et = et;
  terms.e1 = e1;
  double d = 0, distance = sums_needed & kForward ? kl_forward : kl_reverse;
  bool apart = false;
  if (divergence.linear) {
    const Linear& k = divergence.coefficients;
    // Terms whose coefficient is 0 may be infinite.
    if (k.c_pp + k.c_pq != 0) d += (k.c_pp + k.c_pq) * p_logp;
    if (k.c_pq != 0) d -= k.c_pq * kl_forward;
    double over_q = 0;  // sum q (c_qp logp + c_qq logq)
    if (k.c_qp + k.c_qq != 0) over_q += (k.c_qp + k.c_qq) * q_logq;
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
  } else {
    // A NaN logit has spoilt the whole row, and a row of -inf has no distribution; functors see neither.
    double score_sum = !(sums.zs > 0 && sums.zt > 0) ? std::numeric_limits<double>::quiet_NaN() : 0;
    d = score_sum;
    const Vec<C> zero = {};
    const Params<Vec<C>> params{zero + C(num.param0), zero + C(args.param1), zero + C(1 - num.param0)};
    const auto& tiles = ValueTable<X, Y>::kDivergences[args.divergence];
    const auto value_of_tile = trusting && as.trusts(at) ? tiles.guarded : tiles.any;
    const bool wanted = (num.kd != 0 || args.stats != nullptr) && !equal;
    for (int64_t tile = 0; tile < row.tiles() && wanted && !std::isnan(score_sum); ++tile)
      value_of_tile(row, tile, as, at, log2_zs, log2_zt, params, es, et, d, score_sum);
    apart = score_sum > (1 - kNearlyEqual) * tiles.limit(num.param0);
    distance = tiles.as_forward_kl(d, num.param0);
    terms.b = -f;
    terms.a = -f * iq * score_sum;
  }
  d = equal ? 0 : at_least_0(d);
  if (num.kd != 0 && sums.zs > 0 && sums.zt > 0 && !equal) {
    const Linear& k = divergence.coefficients;
    const bool near = (divergence.linear ? distance : d) < kNearlyEqual;
    const bool may_agree = near || (k.c_pq != 0 && k.c_qp != 0 && distance < kNearForBoth);
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
    if (exactly && std::isfinite(sums.zs) && std::isfinite(sums.zt)) return add_exactly(num, s, t, label, out);
  }
  if (num.kd != 0) result.loss = num.kd * num.tau * d;
  if (num.kd == 0 || num.weight == 0 || equal) {
    terms.a = terms.b = terms.ks = terms.kst = 0;
    terms.logs = false;
  }
  // Left out: 0 times what a NaN of the teacher, or an infinite score, made of et would still be NaN.
  if (num.kd == 0 && out != nullptr && !(divergence.linear && std::isfinite(sums.zt)))
    std::fill(et, et + row.slots(), C(0));

  if (wants_ce) {
    const Affine<C>& base = ce == kCeOwn ? a1 : as;
    const double log_z = kLn2 * std::log2(z1), reference = base.logit(), lse = reference + log_z;
    double cross_entropy = 0;
    if (num.ce != 0) {
      cross_entropy = cross_entropy_of(s, n, label, args.label_smoothing, reference, log_z);
      result.loss += num.ce * cross_entropy;
      terms.c0 = -num.weight * num.ce * args.label_smoothing / double(n);
    }
    if (num.z != 0) result.loss += num.z * lse * lse;
    const double c1 = num.weight * (num.ce + (num.z != 0 ? 2 * num.z * lse : 0)) / z1;
    if (num.ce == 0 && num.z == 0) {
      // For the statistics alone.
    } else if (ce == kCeSame) {
      terms.a += c1;
    } else if (c1 != 0) {
      terms.ce = keeps_powers ? kCeOwn : ce;
      terms.c1 = c1;
    }
    result.stats[1] = cross_entropy;
    result.stats[2] = lse;
  }
  result.stats[0] = d;

  // es (xs - xt) was kept, but for scale and references: in the place of et, or where cross entropy has no part of its
  // own.
  const bool in_et = sums_needed == kReverse, in_kept = (sums_needed & kKept) != 0 && terms.ce == kCeNone;
  if (kFused && std::is_same_v<C, float> && terms.logs && (in_et || in_kept) && trusting && as.trusts(at)) {
    terms.a -= terms.ks * (as.reference() - at.reference());
    if (in_et) {
      terms.b = terms.ks * double(as.c);
    } else {
      terms.ce = kCeOwn;
      terms.e1 = kept;
      terms.c1 = -terms.ks * double(as.c);
    }
    terms.ks = 0;
    terms.logs = false;
  }

  if (out != nullptr) {
    const bool has_label = num.ce != 0 && label >= 0 && label < n;
    // Read before the gradient may overwrite the student.
    const double xs = has_label && terms.logs ? as.scalar(to_compute(s[label])) : 0;
    const double xt = has_label && terms.logs ? at.scalar(to_compute(t[label])) : 0;
    double accepted_sum = 0;
    if (args.stats != nullptr && with_gradient) {
      terms.accepted = &accepted_sum;
      terms.ratio = ip / iq;
    }
    double at_label = 0;
    if (has_label) at_label = gradient_at(row, terms, label, xs, xt) - num.weight * num.ce * (1 - args.label_smoothing);
    const bool stores_label = has_label && !(streamed && set_gradient(terms, row.slot(label), at_label));
    if (deferred && beside_sweep(sums_needed, terms)) {
      postpone(row, terms, out, streamed, pending, acceptance, iq);
      if (stores_label) pending.label = out + label, pending.at_label = C(at_label);
    } else {
      write_gradient(row, terms, out, streamed);
      if (terms.accepted != nullptr) result.stats[8] = accepted_sum * iq;
      if (stores_label) from_compute(C(at_label), out + label);
    }
  }
  return result;
}

}  // namespace KDK_ISA
}  // namespace kdk
