// Values and scores of the divergences that are not linear in the logarithms, from the scratch of a row.
#pragma once

#include "affine.h"
#include "divergence_list.h"
#include "math.h"
#include "row.h"

#include <cmath>

namespace kdk {
inline namespace KDK_ISA {

// Functors go four vectors abreast (see Pair). Not with AVX-512: its processors look far enough ahead by themselves,
// and one vector after the other needs no register spilled, 3 to 5 % faster.
constexpr bool kQuads = kVectorBytes < 64;

// Values and scores of a tile; the scores replace the teacher's exponentials. GUARDED: see divergences.h.
template <bool GUARDED, Part PART, class F, class X, class Y>
void value_tile(const Row<X, Y>& row, int64_t tile, const Affine<typename Io<X>::C>& student,
                const Affine<typename Io<X>::C>& teacher, double log2_zs, double log2_zt,
                Params<Vec<typename Io<X>::C>> parameters, const typename Io<X>::C* es, typename Io<X>::C* et,
                double& value_sum, double& score_sum) {
  using C = typename Io<X>::C;
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  using Quad = Pair<Pair<V>>;
  constexpr bool paired = Paired<F>::value;
  const V ip = V{} + C(std::exp2(-log2_zt)), iq = V{} + C(std::exp2(-log2_zs));
  const V lzs = V{} + C(kLn2 * log2_zs), lzt = V{} + C(kLn2 * log2_zt), ln2 = V{} + C(kLn2);
  const C cs = C(kLn2 * double(student.c)), ct = C(kLn2 * double(teacher.c));
  const V rs = V{} + C(student.log_normalizer(log2_zs, cs)), rt = V{} + C(teacher.log_normalizer(log2_zt, ct));
  const auto quad = [](V x) { return Quad({x, x}, {x, x}); };
  V values = {}, scores = {};
  row.template pieces<PART>(
      tile, [&](const X* s, const Y* t, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
        const C* es_in = es + slot;
        C* et_io = et + slot;
        const Affine<C> as = student, at = teacher;
        const Params<Quad> params4{quad(parameters.x0), quad(parameters.x1), quad(parameters.rest)};
        V local_values = values, local_scores = scores;
        // Where the guard bounds the logits, one multiplication is exact enough.
        const auto log_p = [&](V x) KDK_LAMBDA_INLINE { return GUARDED ? x * ct - rt : at(x) * ln2 - lzt; };
        const auto log_q = [&](V x) KDK_LAMBDA_INLINE { return GUARDED ? x * cs - rs : as(x) * ln2 - lzs; };
        while (kQuads && !lanes.kEdge && blocks >= 2) {
          const Quad p = unfused(load4<C>(et_io) * quad(ip)), q = unfused(load4<C>(es_in) * quad(iq));
          Quad value, score;
          if constexpr (paired) {
            F::paired(params4, p, q, value, score);
          } else {
            V s0, s1, s2, s3, t0, t1, t2, t3;
            Io<X>::load2(s, s0, s1);
            Io<X>::load2(s + block, s2, s3);
            load2_as<X>(t, t0, t1);
            load2_as<X>(t + block, t2, t3);
            const Quad logp = GUARDED ? Quad({t0, t1}, {t2, t3}) * quad(V{} + ct) - quad(rt)
                                      : Quad({at(t0), at(t1)}, {at(t2), at(t3)}) * quad(ln2) - quad(lzt);
            const Quad logq = GUARDED ? Quad({s0, s1}, {s2, s3}) * quad(V{} + cs) - quad(rs)
                                      : Quad({as(s0), as(s1)}, {as(s2), as(s3)}) * quad(ln2) - quad(lzs);
            F::template eval<GUARDED>(params4, p, logp, q, logq, value, score);
          }
          local_values += horizontal(horizontal(value));
          local_scores += horizontal(horizontal(score));
          store4<C>(et_io, score);
          blocks -= 2, s += 2 * block, t += 2 * block, es_in += 2 * block, et_io += 2 * block;
        }
        for (; blocks > 0; --blocks, s += block, t += block, es_in += block, et_io += block) {
          V value0, score0, value1, score1;
          const V p0 = unfused(load<V>(et_io) * ip), p1 = unfused(load<V>(et_io + kLanes<C>) * ip);
          const V q0 = unfused(load<V>(es_in) * iq), q1 = unfused(load<V>(es_in + kLanes<C>) * iq);
          if constexpr (paired) {
            F::paired(parameters, p0, q0, value0, score0);
            F::paired(parameters, p1, q1, value1, score1);
          } else {
            constexpr C nothing = -std::numeric_limits<C>::infinity();
            V s0, s1, t0, t1;
            load_block(s, lanes, nothing, s0, s1);
            load_block(t, lanes, nothing, t0, t1);
            const V logp0 = log_p(t0), logp1 = log_p(t1), logq0 = log_q(s0), logq1 = log_q(s1);
            F::template eval<GUARDED>(parameters, p0, logp0, q0, logq0, value0, score0);
            F::template eval<GUARDED>(parameters, p1, logp1, q1, logq1, value1, score1);
          }
          local_values += value0 + value1;
          local_scores += score0 + score1;
          store(et_io, score0);
          store(et_io + kLanes<C>, score1);
        }
        values = local_values;
        scores = local_scores;
      });
  value_sum += horizontal_sum<C>(Paired<F>::less_score ? values + scores : values);
  score_sum += horizontal_sum<C>(scores);
}

template <class X, class Y, class C = typename Io<X>::C>
using ValueTile = void (*)(const Row<X, Y>&, int64_t, const Affine<C>&, const Affine<C>&, double, double,
                           Params<Vec<C>>, const C*, C*, double&, double&);

// A functor's value_tile for one type of logits each: for any row, and for one whose bounds were watched.
template <class X, class Y = X>
struct ValueTiles {
  ValueTile<X, Y> any = nullptr, guarded = nullptr;
  // See Paired.
  double (*limit)(double) = nullptr;
  double (*as_forward_kl)(double, double) = nullptr;
};
template <class F>
double limit_of(double parameter) {
  if constexpr (Paired<F>::value) return F::limit(parameter);
  return HUGE_VAL;
}
template <class F>
double as_forward_kl(double value, double parameter) {
  if constexpr (Paired<F>::value) return F::as_forward_kl(value, parameter);
  return value;
}
template <class F, class X, class Y>
void guarded_value_tile(const Row<X, Y>& row, int64_t tile, const Affine<float>& student, const Affine<float>& teacher,
                        double log2_zs, double log2_zt, Params<VecF> parameters, const float* es, float* et,
                        double& value_sum, double& score_sum) {
  value_tile<true, kBody, F>(row, tile, student, teacher, log2_zs, log2_zt, parameters, es, et, value_sum, score_sum);
  // The padding of the edges is -inf.
  if (row.padded(tile))
    value_tile<false, kEdges, F>(row, tile, student, teacher, log2_zs, log2_zt, parameters, es, et, value_sum,
                                 score_sum);
}
template <class F, class X, class Y = X>
constexpr ValueTiles<X, Y> value_tiles() {
  if constexpr (kFused && Io<X>::kCoarse && !Paired<F>::value) {
    return {value_tile<false, kWhole, F, X, Y>, guarded_value_tile<F, X, Y>, limit_of<F>, as_forward_kl<F>};
  } else {
    return {value_tile<false, kWhole, F, X, Y>, value_tile<false, kWhole, F, X, Y>, limit_of<F>, as_forward_kl<F>};
  }
}

// The same table for the value_tiles of two types of logits, of which only the files of the student's type know.
template <class X, class Y>
struct ValueTable {
  struct Divergence : ValueTiles<X, Y> {
    template <class F>
    constexpr Divergence(General<F>) : ValueTiles<X, Y>(value_tiles<F, X, Y>()) {}
    constexpr Divergence(OfLogs) : ValueTiles<X, Y>{} {}
  };
#include "kdkernels/divergence_table.h"
};

}  // namespace KDK_ISA
}  // namespace kdk
