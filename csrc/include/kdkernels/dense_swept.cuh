// The dense kernel that makes exponentials again in every sweep over the row.
#pragma once

#include "dense_rows.cuh"
#include "dense_sums.cuh"

namespace kdk {
namespace cuda {

template <class X>
struct SweptRow {
  static constexpr int kL = kLanes<X>;

  DenseRows<X>& rows;
  const DenseLaunch& launch;
  const DenseArgs& args;
  Cluster& team;
  const Place<X>& place;
  const RowScales& k;
  float picked;
  const bool hard, own;  // own: the hard terms' exponentials are not those at T
  const bool teacher, streamed, special;
  MoveNorms add;
  float unit;  // of a linear divergence
  Norms n;
  // Of its sums.
  float inverse_s = 0, inverse_t = 0, log_zt = 0, log_zs = 0, log_zt_zs = 0;
  // Of a pair: p, q on a common scale are et factor_p, es factor_q.
  float factor_p = 0, factor_q = 0, post = 1, score_sum = 0, mean_q = 0;

  __device__ __forceinline__ bool linear() const { return launch.functor == kNoFunctor; }
  __device__ __forceinline__ bool distils() const { return k.kd_weight != 0; }

  __device__ __forceinline__ SweptRow(DenseRows<X>& rows, Cluster& team, const RowScales& scales, float label_logit)
      : rows(rows),
        launch(rows.launch),
        args(rows.args),
        team(team),
        place(rows.place),
        k(scales),
        picked(launch.student_softcap != 0 ? launch.student_softcap * tanhf(label_logit / launch.student_softcap)
                                           : label_logit),
        hard(launch.ce_weight != 0 || launch.z_loss_weight != 0 || args.stats != nullptr),
        own(hard && k.scale_s != kLog2e),
        teacher(rows.reads_teacher),
        streamed(launch.plan.source == Source::kStreamed),
        special(launch.student_softcap != 0 || launch.teacher_softcap != 0 ||
                args.teacher_form == TeacherForm::kProbs) {
    const Linear& c = launch.coefficients;
    // Without the teacher's logarithms the student's temperature is the better unit.
    const bool of_student = c.c_pp == 0 && c.c_qp == 0;
    const float ratio = of_student ? 1.0f : k.ratio;
    unit = of_student ? k.unit_s : k.unit_t;
    add = {k.scale_s, k.scale_t, float(c.c_pp), float(c.c_pq) * ratio, float(c.c_qp), float(c.c_qq) * ratio};
  }

  // A vector of both rows.
  struct Vectors {
    float s[kL], t[kL];
  };
  // Logits as the objective sees them: after softcaps, of probabilities their logarithms; -inf past the row's ends. One
  // copy of the code.
  static __device__ __noinline__ Vectors transformed(const DenseLaunch& launch, int first, Vectors x) {
    const float cap_s = launch.student_softcap, cap_t = launch.teacher_softcap;
    const bool probs = launch.args.teacher_form == TeacherForm::kProbs;
#pragma unroll
    for (int l = 0; l < kL; ++l) {
      if (cap_s != 0) x.s[l] = cap_s * tanhf(x.s[l] / cap_s);
      if (probs) {
        x.t[l] = x.t[l] > 0 ? logf(x.t[l]) : x.t[l] == 0 ? -INFINITY : NAN;
      } else if (cap_t != 0) {
        x.t[l] = cap_t * tanhf(x.t[l] / cap_t);
      }
      if (first + l < 0 || first + l >= int(launch.args.columns)) x.s[l] = x.t[l] = -INFINITY;
    }
    return x;
  }
  __device__ __forceinline__ void unpack_both(int i, const uint4& s, const uint4& t, Vectors& x) const {
    unpack<X>(s, x.s);
    unpack<X>(t, x.t);
    if (special) x = transformed(launch, place.first(i), x);
  }

  // Calls visit(i, x) for the thread's vectors. A row that is too wide for shared memory comes by copies of the
  // thread's own, a few vectors ahead.
  template <class Visit>
  __device__ __forceinline__ void sweep(bool backwards, Visit visit) const {
    const int steps = (place.count + team.threads - 1) / team.threads;
    const uint32_t at_s = rows.student(rows.stage) + 16 * team.thread, at_t = at_s + 16 * rows.capacity;
    const int stride = 16 * team.threads;
    const auto vector_of = [&](int j) {
      return j < steps ? (backwards ? steps - 1 - j : j) * team.threads + team.thread : place.count;
    };
    Whole whole_s, whole_t;
    if (streamed) {
      whole_s = place.whole(place.s, rows.columns), whole_t = place.whole(place.t, rows.columns);
      for (int j = 0; j < kDenseRing; ++j) copy_ahead(j, vector_of(j), whole_s, whole_t);
    }
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      // Together again, so that a warp's accesses are whole sectors.
      __syncwarp();
      const int turn = backwards ? steps - 1 - j : j, i = turn * team.threads + team.thread;
      const uint32_t at = (streamed ? j % kDenseRing : turn) * stride;
      if (streamed) copies_done_but<kDenseRing - 1>();
      Vectors x;
      const bool there = i < place.count;
      const uint4 raw_s = load_shared_if(there, at_s + at), raw_t = load_shared_if(there, (teacher ? at_t : at_s) + at);
      if (streamed) copy_ahead(j + kDenseRing, vector_of(j + kDenseRing), whole_s, whole_t);
      if (!there) continue;
      unpack_both(i, raw_s, raw_t, x);
      visit(i, x);
    }
    if (streamed) copies_done();
  }
  __device__ __forceinline__ void copy_ahead(int j, int i, const Whole& whole_s, const Whole& whole_t) const {
    if (i < place.count) {
      const uint32_t at = rows.student(0) + 16 * (j % kDenseRing * team.threads + team.thread);
      rows.copy_vector(place, whole_s, place.s, place.s + place.first(i), i, at);
      if (teacher) rows.copy_vector(place, whole_t, place.t, place.t + place.first(i), i, at + 16 * rows.capacity);
    }
    copies_are_a_group();
  }

  __device__ __forceinline__ void find_tops() {
    Tops tops;
    tops.read = __float_as_int(picked);
    if (streamed) {
      tops.s = order_of(n.top_s), tops.t = order_of(n.top_t);
      tops = team.over(tops, MaxTops());
      add.move(n, of_order(tops.s), of_order(tops.t));
    } else {
      uint4 most_s = lowest_vector(), most_t = most_s;
      const uint32_t at_s = rows.student(rows.stage), at_t = rows.teacher(rows.stage);
#pragma unroll 2
      for (int i = team.thread; i < place.count; i += team.threads) {
        most_s = packed_max<X>(most_s, load_shared(at_s + 16 * i));
        if (teacher) most_t = packed_max<X>(most_t, load_shared(at_t + 16 * i));
      }
      tops.s = order_of(largest<X>(most_s)), tops.t = order_of(largest<X>(most_t));
      tops = team.over(tops, MaxTops());
      // Softcaps and logarithms keep the order.
      Vectors x;
      x.s[0] = of_order(tops.s), x.t[0] = of_order(tops.t);
      if (special) {
#pragma unroll
        for (int l = 1; l < kL; ++l) x.s[l] = x.s[0], x.t[l] = x.t[0];
        x = transformed(launch, 0, x);
      }
      n.top_s = x.s[0], n.top_t = x.t[0];
    }
  }
  static __device__ __forceinline__ uint4 lowest_vector() {
    float x[kL];
#pragma unroll
    for (float& value : x) value = -INFINITY;
    return pack<X>(x);
  }

  // ONLINE: relative to maxima that rise on the way.
  template <bool ONLINE>
  __device__ __forceinline__ void add_up() {
    const bool smooths = values_ce(launch) && launch.label_smoothing != 0;
    const bool over_p = add.c_pp != 0 || add.c_pq != 0, over_q = add.c_qp != 0 || add.c_qq != 0;
    const bool overlaps = launch.kind == Held::kSkewKl;
    const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
    sweep(false, [&](int i, const Vectors& x) {
      if constexpr (ONLINE) {
        float high_s = n.top_s, high_t = n.top_t;
#pragma unroll
        for (float value : x.s) high_s = fmaxf(high_s, value);
#pragma unroll
        for (float value : x.t) high_t = fmaxf(high_t, value);
        if (high_s > n.top_s || high_t > n.top_t) add.move(n, high_s, high_t);
      }
      float ds[kL], es[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        ds[l] = x.s[l] - n.top_s;
        es[l] = exp2_fast(ds[l] * k.scale_s);
        n.zs += es[l];
      }
      if (teacher) {
        float dt[kL], et[kL];
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          dt[l] = x.t[l] - n.top_t;
          et[l] = exp2_fast(dt[l] * k.scale_t);
          n.zt += et[l];
        }
        if (add.c_pp == 1) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.p = add_product(n.p, et[l], fmaf(ds[l], add.c_pq, dt[l]));
        } else if (over_p) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.p = add_product(n.p, et[l], fmaf(ds[l], add.c_pq, add.c_pp * dt[l]));
        }
        if (over_q) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.q = add_product(n.q, es[l], fmaf(dt[l], add.c_qp, add.c_qq * ds[l]));
        }
        if (overlaps) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.overlap = fmaf(es[l], et[l], n.overlap);
        }
      }
      if (own) {
#pragma unroll
        for (int l = 0; l < kL; ++l) n.zh += exp2_fast(ds[l] * kLog2e);
      }
      if (smooths) {
        const int first = place.first(i);
#pragma unroll
        for (int l = 0; l < kL; ++l) n.centered += first + l >= 0 && first + l < rows.columns ? x.s[l] - center : 0.0f;
      }
    });
  }

  __device__ __forceinline__ void find_norms() {
    if (streamed) {
      add_up<true>();
      find_tops();
    } else {
      find_tops();
      add_up<false>();
    }
    const float top_s = n.top_s, top_t = n.top_t;
    n = team.over(n, AddMoved());
    n.top_s = top_s, n.top_t = top_t;
    // A row of -inf is no distribution.
    if (!(n.zs > 0)) n.zs = NAN;
    if (!(n.zt > 0)) n.zt = NAN;
    inverse_s = reciprocal_fast(n.zs), inverse_t = reciprocal_fast(n.zt);
    log_zs = log_of_ratio(n.zs, 1.0f), log_zt = log_of_ratio(n.zt, 1.0f), log_zt_zs = log_of_ratio(n.zt, n.zs);
  }

  // The mean of a linear divergence's logits, and what the normalisers add.
  __device__ __forceinline__ float linear_value() {
    const Linear& c = launch.coefficients;
    mean_q = n.q * inverse_s;
    const float of_p = float(c.c_pp + c.c_qp), of_q = float(c.c_pq + c.c_qq), mean = (n.p * inverse_t + mean_q) * unit;
    if (of_p == 0) return of_q == 0 ? mean : mean - of_q * log_zs;
    return mean + of_q * log_zt_zs - (of_p + of_q != 0 ? (of_p + of_q) * log_zt : 0.0f);
  }

  // Value and score of a pair: light(visit) with a functor known when this is compiled, the lanes side by side.
  template <class F, Score FORM>
  struct Light {
    Params<float> params;
    __device__ __forceinline__ Scored<float> operator()(float p, float, float q, float) const {
      Scored<float> out;
      F::template of_difference<FORM>(params, p, q, p - q, out.value, out.score);
      return out;
    }
  };
  struct LightJsd {
    JsdBySeries jsd;
    __device__ __forceinline__ Scored<float> operator()(float p, float, float q, float) const {
      Scored<float> out;
      jsd(p, q, out.value, out.score);
      return out;
    }
  };
  template <class Visit>
  __device__ __forceinline__ void with_pair(Visit visit) const {
    const Params<float> params{k.param, launch.param1, k.rest};
    const bool equal = n.zt == n.zs, decides = equal || (n.zt < 4 && n.zs < 4);
    switch (launch.kind) {
      case Held::kJsd: return visit(LightJsd{JsdBySeries(params)});
      case Held::kTvd:
        return equal ? visit(Light<Tvd, Score::kPlain>{params}) : visit(Light<Tvd, Score::kApart>{params});
      case Held::kSkewKl:
        return decides && n.overlap > 0.25f ? visit(Light<SkewKl, Score::kNear>{params})
                                            : visit(Light<SkewKl, Score::kPlain>{params});
      case Held::kSkewReverseKl: return visit(Light<SkewReverseKl, Score::kNear>{params});
      default: break;
    }
    visit([&](float p, float logp, float q, float logq) {
      return eval_functor<float>(AllFunctors(), launch.functor, params, p, logp, q, logq);
    });
  }
  __device__ __forceinline__ bool light() const { return is_pair(launch.kind); }

  // Calls use(l, ds, dt, scored) for the lanes of a vector.
  template <class Pair, class Use>
  __device__ __forceinline__ void score_lanes(const Pair& pair, const float (&xs)[kL], const float (&xt)[kL],
                                              Use use) const {
    const auto one = [&](float x, float y) {
      const float ds = x - n.top_s, dt = y - n.top_t;
      const float p = exp2_fast(dt * k.scale_t) * factor_p, q = exp2_fast(ds * k.scale_s) * factor_q;
      return pair(p, fmaf(dt, k.unit_t, -log_zt), q, fmaf(ds, k.unit_s, -log_zs));
    };
    if constexpr (kIsLight<Pair>) {
#pragma unroll
      for (int l = 0; l < kL; ++l) use(l, one(xs[l], xt[l]));
    } else {
      // One copy of the functors.
#pragma unroll 1
      for (int lane = 0; lane < kL; ++lane) {
        float x = xs[0], y = xt[0];
#pragma unroll
        for (int l = 1; l < kL; ++l) x = l == lane ? xs[l] : x, y = l == lane ? xt[l] : y;
        use(lane, one(x, y));
      }
    }
  }
  template <class Pair>
  struct IsLight {
    static constexpr bool value = __is_same(Pair, LightJsd);
  };
  template <class F, Score FORM>
  struct IsLight<Light<F, FORM>> {
    static constexpr bool value = true;
  };
  template <class Pair>
  static constexpr bool kIsLight = IsLight<Pair>::value;

  __device__ __forceinline__ void add_statistics(int i, const float (&xs)[kL], const float (&xt)[kL],
                                                 Second& sums) const {
    const int first = place.first(i);
#pragma unroll 1
    for (int lane = 0; lane < kL; ++lane) {
      float x = xs[0], y = xt[0];
#pragma unroll
      for (int l = 1; l < kL; ++l) x = l == lane ? xs[l] : x, y = l == lane ? xt[l] : y;
      const float ds = x - n.top_s, dt = y - n.top_t;
      const float p = exp2_fast(dt * k.scale_t) * inverse_t, q = exp2_fast(ds * k.scale_s) * inverse_s;
      const float logp = dt * k.unit_t, logq = fmaf(ds, k.unit_s, log_zt_zs);
      if (fmaxf(logp, logq) != -INFINITY) {
        sums.forward += product_or_0(p, logp - logq);
        sums.reverse += product_or_0(q, logq - logp);
      }
      sums.entropy_p -= product_or_0(p, logp);
      sums.entropy_q -= product_or_0(q, logq);
      // A NaN must not lose against a number.
      sums.overlap += p < q ? p : q;
      if (ds == 0) sums.at_s = min(sums.at_s, first + lane);
      if (dt == 0) sums.at_t = min(sums.at_t, first + lane);
    }
  }

  __device__ __forceinline__ void write(const HardTerms& terms) const {
    const Linear& c = launch.coefficients;
    const bool scored = distils() && !linear(), over_q = distils() && linear() && (c.c_qp != 0 || c.c_qq != 0);
    const bool over_p = distils() && linear() && c.c_pq != 0;
    const float scale = k.kd * k.unit_s, of_q = scale * unit * inverse_s, pulled = factor_q * score_sum;
    float of_p = -float(c.c_pq) * scale * inverse_s;
    float less_ratio_z = -(1 + (n.zs - n.zt) * inverse_t);
    const float cap = launch.student_softcap, inverse_cap = cap != 0 ? 1 / cap : 0.0f;
    const int64_t label = values_ce(launch) ? args.labels[rows.row] : -1;
    const auto finish = [&](int i, const float (&xs)[kL], float (&g)[kL]) {
      const int first = place.first(i);
      if (terms.counts) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          g[l] = fmaf(terms.factor, exp2_fast((xs[l] - n.top_s) * kLog2e), g[l] - terms.floor);
        if (label >= first && label < first + kL) {
#pragma unroll
          for (int l = 0; l < kL; ++l)
            if (first + l == int(label)) g[l] -= terms.step;
        }
      }
      if (cap != 0) {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] *= 1 - (xs[l] * inverse_cap) * (xs[l] * inverse_cap);
      }
      if (first + kL > rows.columns) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          if (first + l >= rows.columns) g[l] = 0;
      }
      rows.put(i, rows.student(rows.stage) + 16 * i, g);
    };
    if (scored) {
      with_pair([&](const auto& pair) {
        sweep(true, [&](int i, const Vectors& x) {
          float g[kL] = {};
          score_lanes(pair, x.s, x.t, [&](int lane, const Scored<float>& f) {
#pragma unroll
            for (int l = 0; l < kL; ++l)
              if (l == lane) g[l] = fmaf(exp2_fast((x.s[l] - n.top_s) * k.scale_s), -pulled, f.score) * (scale * post);
          });
          finish(i, x.s, g);
        });
      });
      return;
    }
    // Kept from the compiler, which would negate them for every element.
    asm volatile("" : "+f"(less_ratio_z), "+f"(of_p));
    sweep(true, [&](int i, const Vectors& x) {
      float g[kL], es[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) es[l] = exp2_fast((x.s[l] - n.top_s) * k.scale_s);
      if (over_p) {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] = fmaf(exp2_fast((x.t[l] - n.top_t) * k.scale_t), less_ratio_z, es[l]) * of_p;
      } else {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] = 0;
      }
      if (over_q) {
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          const float slope = fmaf(x.t[l] - n.top_t, add.c_qp, add.c_qq * (x.s[l] - n.top_s)) - mean_q;
          g[l] += product_or_0(es[l], slope * of_q);
        }
      }
      finish(i, x.s, g);
    });
  }

  __device__ __forceinline__ void run() {
    find_norms();
    rows.fetch_next();
    HardTerms terms;
    if (hard) {
      const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
      terms = HardTerms(launch, rows.row, k.weight, n.top_s, own ? n.zh : n.zs, picked, n.centered, center);
    }
    float divergence = 0;
    Second sums;
    if (teacher) {
      const bool pair = !linear(), scalable = light();
      if (pair) {
        factor_p = scalable ? 1.0f : inverse_t;
        factor_q = !scalable ? inverse_s : n.zt == n.zs ? 1.0f : n.zt * inverse_s;
        post = scalable ? inverse_t : 1.0f;
        with_pair([&](const auto& functions) {
          sweep(true, [&](int, const Vectors& x) {
            score_lanes(functions, x.s, x.t, [&](int, const Scored<float>& f) {
              sums.value += f.value;
              sums.score += f.score;
            });
          });
        });
      }
      if (args.stats != nullptr) sweep(true, [&](int i, const Vectors& x) { add_statistics(i, x.s, x.t, sums); });
      if (pair || args.stats != nullptr) sums = team.over(sums, AddSecond());
      divergence = pair ? sums.value * post : linear_value();
      score_sum = sums.score * post;
      if (launch.kind != Held::kNone) divergence = at_least_0(divergence);
      // A functor may take what is NaN for 0.
      divergence += n.zs + n.zt - (n.zs + n.zt);
    }
    if (team.leads()) {
      static_cast<float*>(args.loss)[rows.row] = (distils() ? k.kd * divergence : 0.0f) + terms.loss;
      if (args.stats != nullptr) {
        float* const stats = static_cast<float*>(args.stats) + int64_t(rows.row) * kStats;
        stats[0] = divergence;
        stats[1] = terms.ce;
        stats[2] = terms.lse;
        stats[3] = at_least_0(sums.forward);
        stats[4] = at_least_0(sums.reverse);
        stats[5] = sums.entropy_p + log_zt;
        stats[6] = sums.entropy_q + log_zt;
        stats[7] = sums.at_s == sums.at_t ? 1.0f : 0.0f;
        stats[8] = sums.overlap;
      }
    }
    if (place.g != nullptr) write(terms);
  }
};

template <class X>
__global__ void __launch_bounds__(kDenseThreads, 2) dense_swept_kernel(const __grid_constant__ DenseLaunch launch) {
  extern __shared__ uint4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  Cluster team(shared, launch.plan);
  DenseRows<X> rows(launch, team, shared, launch.kd_weight != 0 || launch.args.stats != nullptr, false);
  rows.template run<SweptRow<X>>();
}

}  // namespace cuda
}  // namespace kdk
