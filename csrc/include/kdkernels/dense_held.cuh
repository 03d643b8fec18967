// The dense kernel that keeps the exponentials of a thread's columns in registers.
#pragma once

#include "dense_rows.cuh"

namespace kdk {
namespace cuda {

// The divergences whose exponentials stay in registers, by the functor of their pair.
template <Held KIND>
struct PairOf {};
template <>
struct PairOf<Held::kJsd> {
  using F = Jsd;
};
template <>
struct PairOf<Held::kTvd> {
  using F = Tvd;
};
template <>
struct PairOf<Held::kSkewKl> {
  using F = SkewKl;
};
template <>
struct PairOf<Held::kSkewReverseKl> {
  using F = SkewReverseKl;
};
template <class X, Held KIND>
struct HeldRow {
  static constexpr int kL = kLanes<X>, kPieces = kHeldColumns / kL;
  static constexpr bool kPair = is_pair(KIND), kReverse = KIND == Held::kReverseKl, kBoth = KIND == Held::kJeffreys;

  DenseRows<X>& rows;
  const DenseLaunch& launch;
  Cluster& team;
  const Place<X>& place;
  const RowScales& k;
  const float picked;
  static constexpr int stride = 32 * 16;  // from one of the thread's vectors to the next
  const int first_slot;
  const uint32_t at_s, at_t;               // addresses of the first
  const int pieces;                        // the threads' vectors that there are
  float es[kPieces][kL], et[kPieces][kL];  // of a pair et becomes its scores, of a reverse KL x
  float top_s, top_t, total_s, total_t, a = 0, b = 0;

  __device__ __forceinline__ HeldRow(DenseRows<X>& rows, Cluster& team, const RowScales& scales, float picked)
      : rows(rows),
        launch(rows.launch),
        team(team),
        place(rows.place),
        k(scales),
        picked(picked),
        first_slot(rows.first_slot()),
        at_s(rows.student(rows.stage) + 16 * first_slot),
        at_t(at_s + 16 * rows.capacity),
        pieces(rows.launch.plan.pieces) {}

  __device__ __forceinline__ int slot(int piece) const { return first_slot + 32 * piece; }

  __device__ __forceinline__ void find_tops() {
    uint4 most_s = load_shared(at_s), most_t = load_shared(at_t);
#pragma unroll
    for (int piece = 1; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      most_s = packed_max<X>(most_s, load_shared(at_s + piece * stride));
      most_t = packed_max<X>(most_t, load_shared(at_t + piece * stride));
    }
    Tops tops;
    tops.s = order_of(largest<X>(most_s));
    tops.t = order_of(largest<X>(most_t));
    tops.read = __float_as_int(picked);
    tops = team.over(tops, MaxTops());
    top_s = of_order(tops.s), top_t = of_order(tops.t);
    // A row of -inf is no distribution: all that follows is NaN.
    if (!(top_s > kFar<X>)) top_s = -INFINITY;
    if (!(top_t > kFar<X>)) top_t = -INFINITY;
  }

  // x of a linear divergence, in units of the teacher's temperature: exactly ds - dt where temperatures are equal.
  __device__ __forceinline__ float mixed(float ds, float dt) const {
    return kReverse ? fmaf(ds, k.ratio, -dt) : fmaf(ds, -k.ratio, dt);
  }

  // Without a look at the weights: 0 times an infinite logarithm makes the sums NaN, which then are made again.
  static constexpr bool kGuarded = kFar<X> == -INFINITY, kLinear = !kPair;
  static constexpr int kSums = kBoth ? 4 : kPair && KIND != Held::kSkewKl ? 2 : 3;

  template <bool GUARDED>
  static __device__ __forceinline__ float add_term(float total, float weight, float x) {
    return GUARDED ? add_product(total, weight, x) : fmaf(weight, x, total);
  }

  __device__ __forceinline__ void exponentiate() {
    Sums4 sums;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      float xs[kL], xt[kL];
      unpack<X>(load_shared(at_s + piece * stride), xs);
      unpack<X>(load_shared(at_t + piece * stride), xt);
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float ds = xs[l] - top_s, dt = xt[l] - top_t;
        const float e = exp2_fast(ds * k.scale_s), f = exp2_fast(dt * k.scale_t);
        es[piece][l] = e, et[piece][l] = f;
        sums.x[1] += f;
        if constexpr (kBoth) {
          // Terms of first order cancel one by one.
          const float excess = e - f, x = mixed(ds, dt);
          sums.x[0] += excess;
          sums.x[2] = add_term<kGuarded>(sums.x[2], excess, x);
          sums.x[3] = add_term<kGuarded>(sums.x[3], e, x);
        } else {
          sums.x[0] += e;
          if constexpr (kReverse) {
            et[piece][l] = !kGuarded || e != 0 ? mixed(ds, dt) : 0.0f;
            sums.x[2] = fmaf(e, et[piece][l], sums.x[2]);
          } else if constexpr (KIND == Held::kForwardKl) {
            sums.x[2] = add_term<kGuarded>(sums.x[2], f, mixed(ds, dt));
          } else if constexpr (KIND == Held::kSkewKl) {
            sums.x[2] = fmaf(e, f, sums.x[2]);
          }
        }
      }
    }
    sums = team.over(sums, AddSums4<kSums>());
    total_t = sums.x[1], a = sums.x[2], b = sums.x[3];
    total_s = kBoth ? sums.x[0] + total_t : sums.x[0];
    if (kBoth) excess_z = sums.x[0];
    if (kLinear && !kGuarded && (a != a || b != b)) add_terms_again();
  }

  __device__ __forceinline__ void add_terms_again() {
    Sums4 sums;
    if constexpr (kReverse) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece >= pieces) break;
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          et[piece][l] = es[piece][l] != 0 ? et[piece][l] : 0.0f;
          sums.x[0] = fmaf(es[piece][l], et[piece][l], sums.x[0]);
        }
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        float xs[kL], xt[kL];
        unpack<X>(load_shared(at_s + piece * stride), xs);
        unpack<X>(load_shared(at_t + piece * stride), xt);
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          const float ds = xs[l] - top_s, dt = xt[l] - top_t, x = mixed(ds, dt);
          const float e = exp2_fast(ds * k.scale_s), f = exp2_fast(dt * k.scale_t);
          sums.x[0] = add_product(sums.x[0], kBoth ? e - f : f, x);
          if (kBoth) sums.x[1] = add_product(sums.x[1], e, x);
        }
      }
    }
    sums = team.over(sums, AddSums4<2>());
    a = sums.x[0], b = sums.x[1];
  }
  float excess_z = 0;

  template <class F, Score FORM>
  __device__ __forceinline__ Sums4 score_all(float factor_q) {
    const Params<float> params{k.param, 0.0f, k.rest};
    const JsdBySeries jsd(params);
    Sums4 sums;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float p = et[piece][l], q = es[piece][l] * factor_q;
        float value, score;
        if constexpr (KIND == Held::kJsd) {
          jsd(p, q, value, score);
        } else {
          F::template of_difference<FORM>(params, p, q, p - q, value, score);
        }
        et[piece][l] = score;
        sums.x[0] += value;
        sums.x[1] += score;
      }
    }
    return sums;
  }

  // The hard terms from the row's logits in shared memory.
  __device__ __forceinline__ HardTerms hard_terms() {
    const bool own = k.scale_s != kLog2e, smooths = values_ce(launch) && launch.label_smoothing != 0;
    const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
    float zh = total_s, centered = 0;
    if (own || smooths) {
      Sums4 sums;
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece >= pieces) break;
        float xs[kL];
        unpack<X>(load_shared(at_s + piece * stride), xs);
        const int e = place.first(slot(piece));
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          sums.x[0] += exp2_fast((xs[l] - top_s) * kLog2e);
          const bool real = slot(piece) < place.count && e + l >= 0 && e + l < rows.columns;
          sums.x[1] += real ? xs[l] - center : 0.0f;
        }
      }
      sums = team.over(sums, AddSums4<2>());
      if (own) zh = sums.x[0];
      centered = sums.x[1];
    }
    return HardTerms(launch, rows.row, k.weight, top_s, zh, picked, centered, center);
  }

  __device__ __forceinline__ void run() {
    find_tops();
    rows.fetch_next();
    exponentiate();
    const bool hard = launch.ce_weight != 0 || launch.z_loss_weight != 0;
    const float inverse_s = reciprocal_fast(total_s), inverse_t = reciprocal_fast(total_t);
    if (!kBoth) excess_z = total_s - total_t;
    excess_z *= inverse_t;
    float divergence, mean_q = 0, factor_q = 1, score_sum = 0;
    if constexpr (kPair) {
      using F = typename PairOf<KIND>::F;
      factor_q = total_t == total_s ? 1.0f : total_t * inverse_s;
      Sums4 sums;
      if constexpr (KIND == Held::kTvd) {
        sums = total_t == total_s ? score_all<F, Score::kPlain>(factor_q) : score_all<F, Score::kApart>(factor_q);
      } else if constexpr (KIND == Held::kSkewKl) {
        // Near where the rows are equal, or few tokens have most of both.
        const bool decides = total_t == total_s || (total_t < 4 && total_s < 4);
        sums = decides && a > 0.25f ? score_all<F, Score::kNear>(factor_q) : score_all<F, Score::kPlain>(factor_q);
      } else {
        sums = score_all<F, KIND == Held::kSkewReverseKl ? Score::kNear : Score::kPlain>(factor_q);
      }
      sums = team.over(sums, AddSums4<2>());
      divergence = sums.x[0] * inverse_t;
      score_sum = sums.x[1] * inverse_t;
    } else {
      const float log_zt_zs = team.leads() ? log_of_ratio(total_t, total_s) : 0.0f;
      if constexpr (kBoth) {
        mean_q = b * inverse_s;
        const float mean_excess = a * inverse_t;
        // An infinite logarithm makes both terms infinite; their difference has the sign of the excess.
        divergence = fabsf(mean_excess) == INFINITY ? -mean_excess : product_or_0(excess_z, mean_q) - mean_excess;
        divergence *= k.unit_t;
        mean_q = -mean_q;
      } else if constexpr (kReverse) {
        mean_q = a * inverse_s;
        divergence = mean_q * k.unit_t + log_zt_zs;
      } else {
        divergence = a * inverse_t * k.unit_t - log_zt_zs;
      }
    }
    divergence = at_least_0(divergence);
    const float loss = k.kd * divergence;
    HardTerms terms;
    if (hard) terms = hard_terms();
    if (team.leads()) static_cast<float*>(launch.args.loss)[rows.row] = loss + terms.loss;
    if (place.g != nullptr) write(terms, hard, inverse_s, inverse_t, mean_q, factor_q, score_sum);
  }
  __device__ __forceinline__ void write(const HardTerms& terms, bool hard, float inverse_s, float inverse_t,
                                        float mean_q, float factor_q, float score_sum) const {
    const float scale = k.kd * k.unit_s, of_q = scale * k.unit_t * inverse_s;
    // Exactly 1 for equal rows, so that their gradient is exactly 0.
    const float ratio_z = 1 + excess_z, pulled = factor_q * score_sum;
    const float factor = kPair ? scale * inverse_t : scale * inverse_s;
    const int64_t label = launch.args.ce_weight != 0 ? launch.args.labels[rows.row] : -1;
    const int label_vector = label >= 0 && label < rows.columns ? place.grid.vector_of(int(label)) - place.begin : -1;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      float g[kL], xs[kL], xt[kL];
      if constexpr (kBoth) {
        unpack<X>(load_shared(at_s + piece * stride), xs);
        unpack<X>(load_shared(at_t + piece * stride), xt);
      }
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float e = es[piece][l], f = et[piece][l];
        if constexpr (kPair) {
          g[l] = fmaf(e, -pulled, f) * factor;
        } else if constexpr (kReverse) {
          g[l] = e * ((f - mean_q) * of_q);
        } else if constexpr (kBoth) {
          // Where one outcome has all but 1e-8 of both, the ratio's excess over 1 is what there is.
          const float slope = fmaf(xs[l] - top_s, k.ratio, -(xt[l] - top_t)) - mean_q;
          g[l] = fmaf(fmaf(f, -excess_z, e - f), factor, product_or_0(e, slope * of_q));
        } else {
          g[l] = fmaf(f, -ratio_z, e) * factor;
        }
      }
      if (hard) add(terms, piece, label_vector, int(label), g);
      if (slot(piece) < place.count) rows.put(slot(piece), at_s + piece * stride, g);
    }
  }

  __device__ __forceinline__ void add(const HardTerms& terms, int piece, int label_vector, int label,
                                      float (&g)[kL]) const {
    float xs[kL];
    unpack<X>(load_shared(at_s + piece * stride), xs);
    const int first = place.first(slot(piece));
#pragma unroll
    for (int l = 0; l < kL; ++l) g[l] = fmaf(terms.factor, exp2_fast((xs[l] - top_s) * kLog2e), g[l] - terms.floor);
    if (slot(piece) == label_vector) {
#pragma unroll
      for (int l = 0; l < kL; ++l)
        if (first + l == label) g[l] -= terms.step;
    }
    if (first + kL > rows.columns) {
#pragma unroll
      for (int l = 0; l < kL; ++l)
        if (first + l >= rows.columns) g[l] = 0;
    }
  }
};

template <class X, Held KIND>
__global__ void __launch_bounds__(kDenseThreads, 1) dense_held_kernel(const __grid_constant__ DenseLaunch launch) {
  extern __shared__ uint4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  Cluster team(shared, launch.plan);
  DenseRows<X> rows(launch, team, shared, true, true);
  rows.template run<HeldRow<X, KIND>>();
}

}  // namespace cuda
}  // namespace kdk
