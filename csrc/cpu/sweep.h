// Sweeps over a row of both models: the exponentials relative to a running reference go to a row scratch (L2), with the
// sums that the divergence needs. All that follows reads the scratch only, so that every logit costs one exponential
// and is read from memory once. The reference is the maximum of the first elements of the row; a row whose sums pass
// kLargestSum is swept again from its true maximum.
#pragma once

#include "pending.h"
#include "reduce.h"

#include <cmath>

namespace kdk {
inline namespace KDK_ISA {

constexpr int64_t kSeedElements = 128;
// A sum of 2^x above this sends the row back for its true maximum: sums of 2^x * x stay finite up to it, those of a
// power of 2^x only up to its root.
constexpr double kLargestSum = 0x1p80;

// Adds a block, two vectors of both models, to the sums, and stores its exponentials. A clamped x stands for x wherever
// its exponential is 0, so that 0 * inf does not arise. Only the other model's x must stay as it is, for mass where the
// other has none costs infinitely much; MASKING covers its -inf where there is no mass.
template <int SUMS, bool MASKING, int DEGREE, class C>
KDK_INLINE void accumulate(Vec<C> xs0, Vec<C> xs1, Vec<C> xt0, Vec<C> xt1, C* es_out, C* et_out, Accumulators<C>& acc) {
  using V = Vec<C>;
  const V zero = {};
  const V cs0 = clamp_exponent(xs0), cs1 = clamp_exponent(xs1), ct0 = clamp_exponent(xt0), ct1 = clamp_exponent(xt1);
  const V es0 = exp2_fast<DEGREE>(cs0), et0 = exp2_fast<DEGREE>(ct0);
  const V es1 = exp2_fast<DEGREE>(cs1), et1 = exp2_fast<DEGREE>(ct1);
  acc.zs += es0 + es1;
  acc.zt += et0 + et1;
  if (SUMS & kForward) {
    acc.forward += et0 * (MASKING ? keep(et0 != zero, ct0 - xs0) : ct0 - xs0);
    acc.forward += et1 * (MASKING ? keep(et1 != zero, ct1 - xs1) : ct1 - xs1);
  }
  if (SUMS & kReverse) {
    acc.reverse += es0 * (MASKING ? keep(es0 != zero, cs0 - xt0) : cs0 - xt0);
    acc.reverse += es1 * (MASKING ? keep(es1 != zero, cs1 - xt1) : cs1 - xt1);
  }
  if (SUMS & kTeacher) {
    acc.teacher += et0 * ct0;
    acc.teacher += et1 * ct1;
  }
  if (SUMS & kStudent) {
    acc.student += es0 * cs0;
    acc.student += es1 * cs1;
    acc.max_s = max_keep_nan(acc.max_s, max_keep_nan(xs0, xs1));
    acc.max_t = max_keep_nan(acc.max_t, max_keep_nan(xt0, xt1));
  }
  store(es_out, es0);
  store(es_out + kLanes<C>, es1);
  store(et_out, et0);
  store(et_out + kLanes<C>, et1);
}

template <int SUMS, bool MASKING, class X, class Y, class C>
void sweep_tile_clamped(const Row<X, Y>& row, int64_t tile, const Affine<C> as, const Affine<C> at, C* es, C* et,
                        RowSums& sums) {
  constexpr int64_t block = Io<X>::kBlock;
  constexpr int degree = kExpDegree<X>;
  constexpr C masked = -std::numeric_limits<C>::infinity();
  Accumulators<C> acc;
  acc.max_s = acc.max_t = Vec<C>{} - std::numeric_limits<C>::infinity();
  row.pieces(tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    C *es_out = es + slot, *et_out = et + slot;
    Accumulators<C> local = acc;
    for (int64_t b = 0; b < blocks; ++b, s += block, t += block, es_out += block, et_out += block) {
      prefetch_ahead<block>(s);
      prefetch_ahead<block>(t);
      Vec<C> s0, s1, t0, t1;
      load_block(s, lanes, masked, s0, s1);
      load_block(t, lanes, masked, t0, t1);
      accumulate<SUMS, MASKING, degree, C>(as(s0), as(s1), at(t0), at(t1), es_out, et_out, local);
    }
    acc = local;
  });
  sums.zs += horizontal_sum<C>(acc.zs);
  sums.zt += horizontal_sum<C>(acc.zt);
  if (SUMS != kForward && SUMS != kForwardAndTeacher)
    sums.most = std::max<double>(sums.most, horizontal_max<C>(acc.zs));
  if (SUMS & kForward) sums.forward += horizontal_sum<C>(acc.forward);
  if (SUMS & kReverse) sums.reverse += horizontal_sum<C>(acc.reverse);
  if (SUMS & kTeacher) sums.teacher += horizontal_sum<C>(acc.teacher);
  if (SUMS & kStudent) {
    sums.student += horizontal_sum<C>(acc.student);
    sums.see_maximum(tile, horizontal_max<C>(acc.max_s), horizontal_max<C>(acc.max_t));
  }
}

// The constants of a row for a sweep without clamps; ratio is the teacher's scale over the student's.
struct UnclampedScales {
  float scale_s, bias_s, masked_s, middle_s, scale_t, bias_t, masked_t, middle_t, ratio;

  UnclampedScales(const Affine<float>& as, const Affine<float>& at)
      : scale_s(as.scale()),
        bias_s(as.bias()),
        masked_s(as.masked_logit()),
        middle_s(float(as.logit())),
        scale_t(at.scale()),
        bias_t(at.bias()),
        masked_t(at.masked_logit()),
        middle_t(float(at.logit())),
        ratio(float(double(at.c) / double(as.c))) {}
};

// The sums of a tile without clamps: over logits instead of x, with the bounds that all of them kept. The sums of one
// model are of logits less one near the reference: of a row whose mass lies far from 0 the sum of et t would be a large
// number that cancels.
template <class X, class Y>
struct UnclampedSums {
  Accumulators<float> sums;
  Bounds bounds;
  Peak<X> peak_s;
  Peak<Y> peak_t;
};

// Sweeps a tile without clamps. A block of the pending gradient is written for every block of the body. The terms of
// kReverse, es (t ratio - s), go to terms with kKept; for kReverse alone, whose gradient needs no exponential of t, to
// et.
template <int SUMS, class X, class Y, class Writer>
KDK_INLINE void sweep_unclamped(const Row<X, Y>& row, int64_t tile, const UnclampedScales& k, float* es, float* et,
                                float* terms, UnclampedSums<X, Y>& all, Writer& writer) {
  using V = VecF;
  constexpr int64_t block = Io<X>::kBlock;
  constexpr int degree = kExpDegree<X>;
  row.pieces(tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    float *es_out = es + slot, *et_out = et + slot, *terms_out = terms + slot;
    UnclampedSums<X, Y> local = all;
    const auto sweep = [&]() KDK_LAMBDA_INLINE {
      prefetch_ahead<block>(s);
      prefetch_ahead<block>(t);
      V s0, s1, t0, t1;
      load_block(s, lanes, k.masked_s, s0, s1);
      load_block(t, lanes, k.masked_t, t0, t1);
      const V es0 = exp2_of_logit<degree>(s0, k.scale_s, k.bias_s, local.bounds);
      const V et0 = exp2_of_logit<degree>(t0, k.scale_t, k.bias_t, local.bounds);
      const V es1 = exp2_of_logit<degree>(s1, k.scale_s, k.bias_s, local.bounds);
      const V et1 = exp2_of_logit<degree>(t1, k.scale_t, k.bias_t, local.bounds);
      Accumulators<float>& sums = local.sums;
      sums.zs += es0 + es1;
      sums.zt += et0 + et1;
      const V difference0 = t0 * k.ratio - s0, difference1 = t1 * k.ratio - s1;
      if (SUMS & kForward) {
        sums.forward += et0 * difference0;
        sums.forward += et1 * difference1;
      }
      if (SUMS & kReverse) {
        sums.reverse -= es0 * difference0;
        sums.reverse -= es1 * difference1;
      }
      if (SUMS & kTeacher) {
        sums.teacher += et0 * (t0 - k.middle_t);
        sums.teacher += et1 * (t1 - k.middle_t);
      }
      if (SUMS & kStudent) {
        sums.student += es0 * (s0 - k.middle_s);
        sums.student += es1 * (s1 - k.middle_s);
        if constexpr (lanes.kEdge) {
          local.peak_s.see(s0, s1), local.peak_t.see(t0, t1);
        } else {
          local.peak_s.see(s, s0, s1), local.peak_t.see(t, t0, t1);
        }
      }
      store(es_out, es0);
      store(es_out + kLanes<float>, es1);
      store(et_out, SUMS == kReverse ? es0 * difference0 : et0);
      store(et_out + kLanes<float>, SUMS == kReverse ? es1 * difference1 : et1);
      if (SUMS & kKept) {
        store(terms_out, es0 * difference0);
        store(terms_out + kLanes<float>, es1 * difference1);
        terms_out += block;
      }
      s += block, t += block, es_out += block, et_out += block;
    };
    int64_t b = 0;
    if constexpr (Writer::kWrites && decltype(lanes)::kEdge) {
      // The last block of a body may be where the tail of the next row goes, and any where an element is left out.
      if ((slot > 0 || row.head == 0) && writer.done < writer.blocks) writer.write_block(es_out, et_out);
    }
    if constexpr (Writer::kWrites && !decltype(lanes)::kEdge) {
      // The pending gradient begins where the body does.
      const int64_t both = std::min(blocks, writer.blocks - writer.done);
      Writer local_writer = writer;
#pragma GCC unroll 2
      for (; b < both; ++b) {
        local_writer.write_block(es_out, et_out);
        sweep();
      }
      writer = local_writer;
    }
#pragma GCC unroll 2
    for (; b < blocks; ++b) sweep();
    all = local;
  });
}

// A tile without clamps. False when a logit was out of bounds: then nothing was added to the sums.
template <int SUMS, class X, class Y>
bool sweep_tile_unclamped(const Row<X, Y>& row, int64_t tile, const Affine<float>& as, const Affine<float>& at,
                          float* es, float* et, float* terms, RowSums& sums, Pending<X>& pending) {
  UnclampedSums<X, Y> all;
  const UnclampedScales scales(as, at);
  with_pending<SUMS>(pending, [&](auto&& writer) KDK_LAMBDA_INLINE {
    sweep_unclamped<SUMS>(row, tile, scales, es, et, terms, all, writer);
  });
  const auto& [acc, bounds, peak_s, peak_t] = all;
  const double zs = horizontal_sum<float>(acc.zs), zt = horizontal_sum<float>(acc.zt);
  if (!bounds.kept() || std::isnan(zs) || std::isnan(zt)) return false;
  sums.zs += zs;
  sums.zt += zt;
  if (SUMS != kForward && SUMS != kForwardAndTeacher)
    sums.most = std::max<double>(sums.most, horizontal_max<float>(acc.zs));
  const double cs = as.c, ct = at.c, rs = as.reference(), rt = at.reference();
  if (SUMS & kForward) sums.forward += cs * double(horizontal_sum<float>(acc.forward)) - (rt - rs) * zt;
  if (SUMS & kReverse) sums.reverse += cs * double(horizontal_sum<float>(acc.reverse)) + (rt - rs) * zs;
  const double middle_s = scales.middle_s, middle_t = scales.middle_t;
  if (SUMS & kTeacher) sums.teacher += ct * double(horizontal_sum<float>(acc.teacher)) + (ct * middle_t - rt) * zt;
  if (SUMS & kStudent) {
    sums.student += cs * double(horizontal_sum<float>(acc.student)) + (cs * middle_s - rs) * zs;
    double high_s = peak_s.value(), high_t = peak_t.value();
    const auto [begin, end] = tile_elements(row, tile, row.n);
    if (std::isnan(high_s)) high_s = maximum(row.s + begin, end - begin);
    if (std::isnan(high_t)) high_t = maximum(row.t + begin, end - begin);
    sums.see_maximum(tile, as.scalar(high_s), at.scalar(high_t));
  }
  return true;
}

template <int SUMS, class X, class Y, class C>
void sweep_tile(const Row<X, Y>& row, int64_t tile, const Affine<C>& as, const Affine<C>& at, C* es, C* et, C* terms,
                bool& unclamped, bool masking, RowSums& sums, Pending<X>& pending) {
  if constexpr (kFused && std::is_same_v<C, float>) {
    if (unclamped && as.in_exp_range(at)) {
      if (sweep_tile_unclamped<SUMS>(row, tile, as, at, es, et, terms, sums, pending)) return;
      unclamped = false;
    }
  }
  pending.finish();
  if (masking || row.padded(tile)) {
    sweep_tile_clamped<SUMS, true>(row, tile, as, at, es, et, sums);
  } else {
    sweep_tile_clamped<SUMS, false>(row, tile, as, at, es, et, sums);
  }
}

// Sum of a power of the exponentials of a tile: at T = 2, 3 and 4 these are the exponentials at T = 1. They go to kept,
// which is e where nobody needs them.
template <int POWER, class C>
double sum_of_powers(const C* e, C* kept, int64_t count) {
  using V = Vec<C>;
  const auto raised = [&](int64_t j) KDK_LAMBDA_INLINE {
    const V x = power<POWER>(load<V>(e + j));
    if (kept != e) store(kept + j, x);
    return x;
  };
  return sum_in_chains<C>(count, raised);
}
template <class C>
double sum_of_powers(int power, const C* e, C* kept, int64_t count) {
  switch (power) {
    case 2: return sum_of_powers<2>(e, kept, count);
    case 3: return sum_of_powers<3>(e, kept, count);
    default: return sum_of_powers<4>(e, kept, count);
  }
}

// Maxima of the first elements of a row, which give it its references.
struct Seeds {
  double s, t;
};
template <class X>
KDK_INLINE double maximum_of_seed(const X* x) {
  using C = typename Io<X>::C;
  Vec<C> high, next, a, b;
  Io<X>::load2(x, high, next);
  for (int64_t j = Io<X>::kBlock; j < kSeedElements; j += Io<X>::kBlock) {
    Io<X>::load2(x + j, a, b);
    high = max_keep_nan(high, a);
    next = max_keep_nan(next, b);
  }
  return double(horizontal_max<C>(max_keep_nan(high, next)));
}
template <class X, class Y>
KDK_INLINE Seeds seeds_of(const X* s, const Y* t, int64_t n) {
  if (n < kSeedElements) return {maximum(s, n), maximum(t, n)};
  return {maximum_of_seed(s), maximum_of_seed(t)};
}

// Sweeps a row from these references, and again from its maxima where it had elements too far above them: sweep(seeds,
// from_maxima) is true where its sums kept their range.
template <class Seed, class Sweep, class FindMaxima>
KDK_INLINE void sweep_in_range(Seed seeds, Sweep sweep, FindMaxima maxima) {
  for (bool from_maxima = false; !sweep(seeds, from_maxima) && !from_maxima; from_maxima = true) seeds = maxima();
}

// Seeds of a row, found while the processor waited for the sums of the row before it; and the row whose seeds are to be
// found next. Null where there is none.
template <class X, class Y>
struct SeedsAhead {
  const X *s = nullptr, *next_s = nullptr;
  const Y *t = nullptr, *next_t = nullptr;
  Seeds seeds{};

  Seeds of(const X* student, const Y* teacher, int64_t n) const {
    return s == student && t == teacher ? seeds : seeds_of(student, teacher, n);
  }
  KDK_INLINE void find(int64_t n) {
    s = next_s, t = next_t;
    if (s != nullptr) seeds = seeds_of(s, t, n);
  }
};

}  // namespace KDK_ISA
}  // namespace kdk
