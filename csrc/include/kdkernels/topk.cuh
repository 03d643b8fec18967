// The sparse top-k pattern on CUDA: loss and gradient of a row in one launch, from one read of its logits where they
// fit into the shared memory of a block or of a cluster of blocks, else from two.
//
// The entries of the teacher are computed with in double, by every block of a cluster alike; in shared memory they
// become -inf, or a bitmap over the row marks them. The sweep leaves them out: it returns the mass of the outcomes
// outside the entries relative to their own maximum, so that nothing has to be subtracted and nothing leaves the range
// of fp32, however far the student is ahead or behind on the entries. In most modes that mass and one factor are all
// that is needed of the outcomes outside, for their gradient is proportional to q. Where it is not (TopkPlan::every),
// their values and scores are computed in fp32, once for their sums and once for the gradient. The gradients of the
// entries are written last, over those of the sweep.
//
// In here x is a logit (capped, at temperature 1), "high" a maximum that exponentials are relative to, and y =
// (x - top) / T, with top the larger of those of the entries and of the others: logarithms of sums are relative to it,
// so that an offset of all logits, up to the largest finite number, costs no digits.
#pragma once

#include "topk_logits.cuh"

namespace kdk {
namespace cuda {

// The numbers of a row, in shared memory: one thread computes them, for arithmetic in double is slow.
struct RowNumbers {
  Found found;
  Masses masses;
  Outside outside;
  double weight, kd, ce, z_loss;                            // of the row and of its terms
  double tau, nats, inverse_t, x0, picked, center;          // y = (x - top) nats
  double rest, log_rest, log_each, teacher_high, log_norm;  // log p = logp inverse_t - log_norm
  double top, log_z, lse_above, q_outside, log_q_outside;   // log q = y - log_z; the logsumexp is top + lse_above
  double y_outside, x_outside;                              // what the exponentials outside are relative to, less top
  double student_mass, w, hard, c0, step, score;            // of the gradient
  float scale, p_each, log_p_each, share, log_share, a, c1;
  int others;  // outcomes
  bool own, known, nan;
};

static_assert(kScratchBytes % 16 == 0 && kScratchBytes + sizeof(RowNumbers) <= kFixedBytes);

template <class X>
struct TopkRow {
  static constexpr int kL = kLanes<X>;

  const TopkLaunch& launch;
  const TopkArgs& args;
  Team team;
  RowNumbers& n;
  int64_t row;
  const X* s;
  X* g;
  Entries entries;
  Logits<X> logits;

  __device__ __forceinline__ float capped(float x) const {
    return logits.cap != 0 ? logits.cap * tanhf(x / logits.cap) : x;
  }
  __device__ __forceinline__ bool wants_ce() const {
    return args.ce_weight != 0 || args.z_loss_weight != 0 || args.stats != nullptr;
  }
  __device__ __forceinline__ bool values_ce() const {
    return args.ce_weight != 0 || (args.stats != nullptr && args.labels != nullptr);
  }
  __device__ __forceinline__ bool smooths() const { return values_ce() && args.label_smoothing != 0; }
  __device__ __forceinline__ bool restricted() const { return args.tail == Tail::kRenormalizeBoth; }
  __device__ __forceinline__ bool swept() const { return !restricted() || wants_ce(); }
  __device__ __forceinline__ bool tempered() const { return args.tail != Tail::kBucket && args.tail != Tail::kDrop; }
  __device__ __forceinline__ bool has_label(int64_t label) const {
    return values_ce() && label >= 0 && label < args.columns;
  }

  template <class Visit>
  __device__ __forceinline__ void for_entries(Visit visit) const {
    for (int j = team.thread; j < entries.slots; j += team.threads)
      if (entries.ids[j] >= 0) visit(j);
  }

  __device__ __forceinline__ void set_up(int64_t label) const {
    const double temperature = per_row(args.student_temperature, row, args.temperature);
    n.weight = args.scale * per_row(args.row_weight, row, 1.0);
    n.kd = args.kd_weight * per_row(args.kd_weights, row, 1.0);
    n.ce = args.ce_weight * per_row(args.ce_weights, row, 1.0);
    n.z_loss = args.z_loss_weight * per_row(args.z_loss_weights, row, 1.0);
    n.tau = args.scale_by_t_squared ? temperature * temperature : 1.0;
    n.scale = float(1.4426950408889634 / temperature);
    n.nats = double(n.scale) * kLn2;
    n.own = wants_ce() && n.scale != kLog2e;
    n.inverse_t = tempered() ? 1 / per_row(args.teacher_temperature, row, args.teacher_temperature_value) : 1.0;
    n.x0 = per_row(args.param, row, args.param0);
    n.picked = has_label(label) ? double(capped(to_float(s[label]))) : NAN;
    n.center = isfinite(n.picked) ? n.picked : 0.0;
  }

  __device__ __forceinline__ Found read_entries() {
    Found found;
    for (int j = team.thread; j < entries.slots; j += team.threads) {
      const int64_t at = row * entries.slots + j;
      const int64_t id =
          args.ids_are_64_bits ? static_cast<const int64_t*>(args.ids)[at] : static_cast<const int32_t*>(args.ids)[at];
      const double logp = id != -1 ? read_number(args.logprobs.data, args.logprobs.dtype, at) : -INFINITY;
      const bool used = !(logp <= kNoEntry), valid = used && id >= 0 && id < args.columns;
      found.invalid |= used && !valid;
      entries.ids[j] = valid ? int(id) : -1;
      entries.x[j] = valid ? capped(to_float(s[id])) : 0.0f;
      entries.logp[j] = valid ? logp : 0.0;
    }
    for (int i = team.thread; i <= entries.mask; i += team.threads) entries.table[i] = -1;
    team.sync();
    bool repeats = false;
    for_entries([&](int j) { repeats |= entries.insert(j); });
    if (__syncthreads_or(repeats)) merge_entries();
    for_entries([&](int j) {
      ++found.count;
      const double p = exp(entries.logp[j]);
      found.mass += p;
      found.nats += p * fabs(entries.logp[j]);
      found.high_logp = fmax(found.high_logp, entries.logp[j]);
      found.high_x = fmaxf(found.high_x, entries.x[j]);
      found.sum_x += double(entries.x[j]) - n.center;
    });
    return team.over_block(found, AddFound(), entries.slots);
  }

  // Equal ids: the first slot takes the sum of their probabilities, the others become unused.
  __device__ __forceinline__ void merge_entries() const {
    for_entries([&](int j) {
      const int id = entries.ids[j];
      if (entries.find(id) != j) return;
      double sum = entries.logp[j];
      for (int k = j + 1; k < entries.slots; ++k)
        if (entries.ids[k] == id) sum = log_add(sum, entries.logp[k]);
      entries.logp[j] = sum;
    });
    team.sync();
    // The table names first slots only, so that nobody looks at the ids of the others meanwhile.
    for_entries([&](int j) {
      if (entries.find(entries.ids[j]) != j) entries.ids[j] = -1;
    });
  }

  // The teacher by its tail mode, up to its norm.
  __device__ __forceinline__ void resolve_teacher() const {
    n.others = int(args.columns) - n.found.count;
    const bool given = args.tail_rows.data != nullptr;
    const double floor = args.min_tail + args.tail_rounding * n.found.nats;
    n.rest = given ? exp(per_row(args.tail_rows, row, 0.0)) : fmax(0.0, 1 - n.found.mass);
    n.log_rest = given ? per_row(args.tail_rows, row, 0.0) : log(n.rest);
    if (n.rest < floor) n.rest = floor, n.log_rest = log(floor);
    // A row without entries is all tail, whatever was captured for it.
    if (n.found.count == 0) n.rest = 1, n.log_rest = 0;
    if (n.others == 0) n.rest = 0, n.log_rest = -INFINITY;
    n.log_each =
        args.tail == Tail::kUniform && n.rest > 0 ? n.inverse_t * (n.log_rest - log(double(n.others))) : -INFINITY;
    n.teacher_high = tempered() ? fmax(n.log_each, n.found.high_logp * n.inverse_t) : 0.0;
    n.known = n.teacher_high != -INFINITY;
  }

  __device__ __forceinline__ Masses sum_entries() {
    Masses masses;
    const bool teacher = tempered() && n.known;
    for_entries([&](int j) {
      const double x = double(entries.x[j]), below = x - double(n.found.high_x);
      if (teacher) masses.teacher += exp(entries.logp[j] * n.inverse_t - n.teacher_high);
      // Where all are -inf there is no mass; NaN passes.
      if (x == -INFINITY) return;
      masses.student += exp(below * n.nats);
      if (n.own) masses.student1 += exp(below);
    });
    return team.over_block(masses, AddMasses(), entries.slots);
  }

  // The student outside the entries.
  __device__ __forceinline__ Outside sum_outside() {
    Outside sums;
    const float scale = n.scale, center = float(n.center);
    const bool own = n.own, adds = smooths();
    if (!logits.marks_all) {
      team.sync();
      logits.leave_out(team, entries);
      team.sync();
    }
    Exponent y(sums.high, scale), at1(sums.high, kLog2e);
    const auto prepare = [&](const auto& raw) {
      uint4 most = raw[0];
#pragma unroll
      for (int j = 1; j < int(sizeof(raw) / sizeof(raw[0])); ++j) most = packed_max<X>(most, raw[j]);
      // One maximum a warp: a new one is seldom then, once a few vectors are through.
      const float high = capped(largest<X>(most));
      if (__any_sync(~0u, high > sums.high)) {
        sums.high = fmaxf(sums.high, high);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) sums.high = fmaxf(sums.high, shuffle_xor(sums.high, mask));
        const Exponent next(sums.high, scale), next1(sums.high, kLog2e);
        sums.z *= y.to(next);
        if (own) sums.z1 *= at1.to(next1);
        y = next, at1 = next1;
      }
    };
    const auto visit = [&](int, const float (&x)[kL], uint32_t dead) {
      sums.z += y.sum(x);
      if (own) sums.z1 += at1.sum(x);
      if (adds) {
#pragma unroll
        for (int l = 0; l < kL; ++l) sums.sum_x += dead >> l & 1 ? 0.0f : x[l] - center;
      }
    };
    if (logits.marks_all) {
      logits.template sweep<4, true>(team, entries, false, prepare, visit);
    } else {
      logits.template sweep<4, false>(team, entries, false, prepare, visit);
    }
    sums = team.over_block_by(sums, kMaxThreads, AddOutsideOfThreads{scale, own, adds});
    return team.over_blocks(sums, AddOutside{scale});
  }

  // log of a sum of two parts, each relative to a maximum of its own.
  static __device__ __forceinline__ double log_total(double y0, double z0, double y1, double z1) {
    const double high = z1 > 0 ? fmax(y0, y1) : y0;
    const double part = z0 > 0 || isnan(z0) ? z0 * exp(y0 - high) : 0.0;
    return high + log(part + z1 * exp(y1 - high));
  }

  // Brings both parts of the student together, at temperature T and at 1.
  __device__ __forceinline__ void normalize() const {
    const Found& found = n.found;
    const Masses& masses = n.masses;
    const Outside& outside = n.outside;
    n.log_norm = 0;
    if (tempered() && n.known) {
      double z = masses.teacher;
      if (n.rest > 0 && args.tail == Tail::kUniform) z += double(n.others) * exp(n.log_each - n.teacher_high);
      n.log_norm = n.teacher_high + log(z);
      n.log_each -= n.log_norm;
    }
    const float top = fmaxf(found.high_x, outside.z > 0 ? outside.high : -INFINITY);
    n.top = top > -INFINITY ? double(top) : 0.0;
    const Exponent y(outside.high, n.scale), x(outside.high, kLog2e);
    n.y_outside = (y.reference() - n.top * double(n.scale)) * kLn2;
    n.x_outside = double(x.high) - n.top + (x.reference() - double(x.high) * double(x.scale)) * kLn2;
    const double x_entries = double(found.high_x) - n.top, y_entries = x_entries * n.nats;
    const double log_z_entries = y_entries + log(masses.student);
    n.log_z = n.lse_above = log_total(y_entries, masses.student, n.y_outside, outside.z);
    if (n.own) n.lse_above = log_total(x_entries, masses.student1, n.x_outside, outside.z1);
    n.student_mass = found.count == 0 || !swept() ? 0.0 : exp(log_z_entries - n.log_z);
    // A functor may take what is NaN for 0; and a student of -inf only is no distribution.
    n.nan = found.invalid || isnan(found.mass) || isnan(n.log_rest) || (swept() && !(n.log_z > -INFINITY));
    if (restricted()) {
      n.log_z = log_z_entries;
      n.nan = n.nan || (found.count > 0 && !(n.log_z > -INFINITY));
    }
    n.log_q_outside = outside.z > 0 ? n.y_outside + log(double(outside.z)) - n.log_z : -INFINITY;
    n.q_outside = exp(n.log_q_outside);
    n.p_each = float(exp(n.log_each));
    n.log_p_each = float(n.log_each);
    n.log_share = float(n.y_outside - n.log_z);
    n.share = float(exp(n.y_outside - n.log_z));
  }

  // The divergence over the entries and, as one more outcome, those outside: the bucket, or where the teacher has no
  // mass there q f(0, 1), for f is linear there. Leaves the scores and q of the entries.
  __device__ __forceinline__ Sums eval_entries() {
    const bool bucket = args.tail == Tail::kBucket && n.others > 0;
    const bool no_teacher =
        !launch.plan.every && (args.tail == Tail::kRenormalize || args.tail == Tail::kDrop) && n.others > 0;
    Sums sums;
#pragma unroll 1
    for (int j = team.thread; j <= entries.slots; j += team.threads) {
      double p, logp, q, logq, times = 1;
      if (j < entries.slots) {
        if (entries.ids[j] < 0) continue;
        logp = entries.logp[j] * n.inverse_t - n.log_norm;
        p = exp(logp);
        logq = (double(entries.x[j]) - n.top) * n.nats - n.log_z;
        q = exp(logq);
      } else if (bucket) {
        p = n.rest, logp = n.log_rest, q = n.q_outside, logq = n.log_q_outside;
      } else if (no_teacher) {
        p = 0, logp = -INFINITY, q = 1, logq = 0, times = n.q_outside;
      } else {
        continue;
      }
      const Params<double> params{n.x0, args.param1, 1 - n.x0};
      const Scored<double> f = eval<double>(launch.coefficients, launch.functor, params, p, logp, q, logq);
      sums.value += f.value * times;
      sums.score += f.score * times;
      if (j == entries.slots) {
        sums.score_outside = f.score * times;
      } else {
        entries.logp[j] = f.score;
        entries.q[j] = q;
      }
    }
    return team.over_block(sums, AddSums(), entries.slots + 1);
  }

  // Calls visit(lane, f) for the outcomes outside in a vector; in a loop that is not unrolled, with lanes chosen by
  // selection, so that there is one copy of the functors and no array in memory.
  template <class Visit>
  __device__ __forceinline__ void eval_lanes(const float (&x)[kL], uint32_t dead, Visit visit) const {
    const int functor = args.tail == Tail::kUniform ? launch.functor : launch.without_teacher;
    const Params<float> params{float(n.x0), float(args.param1), float(1 - n.x0)};
    const Exponent exponent(n.outside.high, n.scale);
#pragma unroll 1
    for (int lane = 0; lane < kL; ++lane) {
      if (dead >> lane & 1) continue;
      float mine = x[0];
#pragma unroll
      for (int l = 1; l < kL; ++l) mine = l == lane ? x[l] : mine;
      const float y = exponent(mine);
      // In base 2 the difference of two of the largest logits would be infinite.
      const float log_q =
          exponent.fused ? fmaf(y, float(kLn2), n.log_share) : fmaf(mine - n.outside.high, float(n.nats), n.log_share);
      visit(lane,
            eval<float>(launch.coefficients, functor, params, n.p_each, n.log_p_each, exp2_fast(y) * n.share, log_q));
    }
  }

  __device__ __forceinline__ Sums eval_outside() {
    Sums sums;
    logits.template sweep<1, true>(team, entries, true, Unprepared(), [&](int, const float (&x)[kL], uint32_t dead) {
      float value = 0, score = 0;
      eval_lanes(x, dead, [&](int, const Scored<float>& f) {
        value += f.value;
        score += f.score;
      });
      sums.value += double(value);
      sums.score += double(score);
    });
    return team.over_cluster(sums, AddSums());
  }

  // The loss, the statistics, and the factors of the gradient: outside the entries it is
  // a e^(y - high) + w score + c1 e^(x - high) + c0.
  __device__ __forceinline__ void finish(const Sums& sums, int64_t label) const {
    const Found& found = n.found;
    const Outside& outside = n.outside;
    const double spoilt = n.nan ? NAN : 0.0, d = (n.known ? sums.value : 0.0) + spoilt;
    const double smoothing = args.label_smoothing;
    double cross_entropy = 0;
    const double lse = n.top + n.lse_above;
    if (values_ce()) {
      cross_entropy = n.lse_above;
      if (smoothing != 1) cross_entropy -= (1 - smoothing) * (n.picked - n.top);
      if (smoothing != 0) {
        double mean = (double(outside.sum_x) + found.sum_x) / double(args.columns);  // less center
        if (!(mean < INFINITY)) mean = -INFINITY;  // it passed the largest number, or met a logit of -inf
        cross_entropy -= smoothing * (n.center - n.top + mean);
      }
      if (cross_entropy < 0) cross_entropy = 0;  // by rounding
    }
    if (team.block == 0) {
      double loss = n.kd != 0 ? n.kd * n.tau * d : 0.0;
      if (n.ce != 0) loss += n.ce * cross_entropy;
      if (n.z_loss != 0) loss += n.z_loss * lse * lse;
      write(loss * n.weight, d, cross_entropy, wants_ce() ? lse : 0.0, found.mass + spoilt, n.student_mass);
    }

    n.w = n.known ? n.weight * n.kd * n.tau * n.nats : 0.0;
    n.score = sums.score;
    n.hard = wants_ce() ? n.weight * (n.ce + 2 * n.z_loss * lse) : 0.0;
    n.c0 = smooths() ? -n.weight * n.ce * smoothing / double(args.columns) : 0.0;
    if (n.kd != 0) n.c0 += spoilt;
    n.step = has_label(label) ? n.weight * n.ce * (1 - smoothing) : 0.0;
    double a = 0;
    if (n.w != 0 && !restricted()) {
      if (launch.plan.every) {
        a = -n.w * double(n.share) * sums.score;
      } else if (!(outside.z <= 0)) {
        a = n.w * (sums.score_outside - n.q_outside * sums.score) / double(outside.z);
      }
    }
    if (n.hard != 0 && !n.own) a += n.hard * exp(n.y_outside - n.lse_above);
    n.a = float(a);
    n.c1 = n.hard != 0 && n.own ? float(n.hard * exp(n.x_outside - n.lse_above)) : 0.0f;
  }

  __device__ __forceinline__ void write(double loss, double d, double cross_entropy, double lse, double teacher_mass,
                                        double student_mass) const {
    static_cast<float*>(args.loss)[row] = float(loss);
    if (args.stats == nullptr) return;
    float* stats = static_cast<float*>(args.stats) + row * kTopkStats;
    stats[0] = float(d);
    stats[1] = float(cross_entropy);
    stats[2] = float(lse);
    stats[3] = float(teacher_mass);
    stats[4] = float(student_mass);
    stats[5] = 0;  // the overlap is the caller's
  }

  template <bool EVERY>
  __device__ __forceinline__ void write_outside(int64_t label) {
    const Grid<X> grid = logits.grid;
    const int columns = int(args.columns), width = int(args.width), last = grid.vectors(columns) - 1;
    const Exponent y(n.outside.high, n.scale), at1(n.outside.high, kLog2e);
    const float a = n.a, c1 = n.c1, c0 = float(n.c0), w = float(n.w);
    const float inverse_cap = logits.cap != 0 ? 1 / logits.cap : 0.0f;
    const int label_vector = EVERY && n.step != 0 ? grid.vector_of(int(label)) : -1;
    const bool own = c1 != 0;
    if (!swept()) {
      // Nothing depends on the logits outside the entries.
      float out[kL];
#pragma unroll
      for (float& lane : out) lane = c0;
      for (int v = logits.begin + team.thread; v < logits.end; v += team.threads) grid.store(g, v, columns, out);
      fill_zero(team, g, grid, last + 1, grid.vectors(width), width);
      return;
    }
    const WholeVectors<X, X> whole(grid, g, width);
    const auto visit = [&](int v, const float (&x)[kL], uint32_t dead) {
      float out[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) out[l] = c0;
      y.add(a, x, out);
      if (own) at1.add(c1, x, out);
      if (EVERY && w != 0) {
        eval_lanes(x, dead, [&](int lane, const Scored<float>& f) {
#pragma unroll
          for (int l = 0; l < kL; ++l)
            if (l == lane) out[l] = fmaf(w, f.score, out[l]);
        });
      }
      if (EVERY && v == label_vector) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          if (grid.first(v) + l == int(label)) out[l] -= float(n.step);
      }
      if (inverse_cap != 0) {
#pragma unroll
        for (int l = 0; l < kL; ++l) out[l] *= 1 - (x[l] * inverse_cap) * (x[l] * inverse_cap);
      }
      const uint4 raw = pack<X>(out);
      if (whole.has(v)) {
        store_global(whole.at(v), raw);
      } else {
        store_edge(g, grid.first(v), width, raw);
      }
    };
    if (EVERY || logits.marks_all) {
      logits.template sweep<EVERY ? 1 : 4, true>(team, entries, true, Unprepared(), visit);
    } else {
      logits.template sweep<4, false>(team, entries, true, Unprepared(), visit);
    }
    fill_zero(team, g, grid, last + 1, grid.vectors(width), width);
  }

  __device__ __forceinline__ bool has(int id) const {
    const int v = logits.grid.vector_of(id);
    return v >= logits.begin && v < logits.end;
  }

  // Over what the sweep wrote there: the entries, the label, and what follows the columns in their last vector.
  __device__ __forceinline__ void write_some(int64_t label) const {
    if (team.thread == 0 && !launch.plan.every && n.step != 0 && has(int(label)) && entries.find(int(label)) < 0) {
      const float x = float(n.picked);
      float out = float(n.c0) + n.a * exp2_fast(Exponent(n.outside.high, n.scale)(x));
      if (n.c1 != 0) out += n.c1 * exp2_fast(Exponent(n.outside.high, kLog2e)(x));
      out -= float(n.step);
      if (logits.cap != 0) out *= 1 - x / logits.cap * (x / logits.cap);
      g[label] = from_float<X>(out);
    }
    const int columns = int(args.columns), after = min(int(args.width), logits.grid.first(logits.end));
    if (logits.begin < logits.end && logits.end == logits.grid.vectors(columns))
      for (int e = columns + team.thread; e < after; e += team.threads) g[e] = from_float<X>(0.0f);
    for_entries([&](int j) {
      const int id = entries.ids[j];
      if (!has(id)) return;
      const double x = double(entries.x[j]);
      double out = n.c0;
      if (n.w != 0) out += n.w * (entries.logp[j] - entries.q[j] * n.score);
      if (n.hard != 0) out += n.hard * exp(x - n.top - n.lse_above);
      if (n.step != 0 && id == int(label)) out -= n.step;
      if (logits.cap != 0) out *= 1 - x / logits.cap * (x / logits.cap);
      g[id] = from_float<X>(float(out));
    });
  }

  __device__ __forceinline__ void run(int64_t label) {
    if (logits.resident != nullptr && swept()) logits.fetch(team);
    if (team.thread == 0) set_up(label);
    const Found found = read_entries();
    if (team.thread == 0) {
      n.found = found;
      resolve_teacher();
    }
    team.sync();
    const Masses masses = sum_entries();
    if (team.thread == 0) n.masses = masses;
    copies_done();
    Outside outside;
    if (swept()) {
      outside = sum_outside();
    } else {
      outside.high = 0;
      team.sync_cluster();
    }
    // From here on nobody reads what another block overwrites where the gradient goes in place.
    if (team.thread == 0) {
      n.outside = outside;
      normalize();
    }
    team.sync();
    Sums sums = eval_entries();
    if (launch.plan.every) sums = AddSums()(sums, eval_outside());
    if (team.thread == 0) finish(sums, label);
    if (g != nullptr) {
      team.sync();
      if (launch.plan.every) {
        write_outside<true>(label);
      } else {
        write_outside<false>(label);
      }
      team.sync();
      write_some(label);
    }
    team.end();
  }
};

template <class X>
__global__ void __launch_bounds__(kMaxThreads, 2) topk_fwd_kernel(const __grid_constant__ TopkLaunch launch) {
  extern __shared__ uint4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  const TopkArgs& args = launch.args;
  const TopkPlan& plan = launch.plan;
  const Team team(shared, plan.cluster);
  const int64_t row = blockIdx.x / unsigned(plan.cluster);
  const int columns = int(args.columns), width = int(args.width);
  const X* s = row_pointer<const X>(args.student, row, args.length);
  X* g = args.wants_grad ? row_pointer<X>(args.dstudent, row, args.length) : nullptr;
  // Where the two lie on different grids the stores are the wide ones.
  Grid<X> grid(g != nullptr ? g : s);
  // Kept from the compiler, which would make it again for every vector.
  asm volatile("" : "+r"(grid.skew));

  const int64_t label = args.labels == nullptr ? 0 : args.labels[row];
  if (args.labels != nullptr && label == args.ignore_index) {
    if (g != nullptr) fill_zero(team, g, grid, 0, grid.vectors(width), width);
    if (team.leads()) {
      static_cast<float*>(args.loss)[row] = 0;
      for (int k = 0; args.stats != nullptr && k < kTopkStats; ++k)
        static_cast<float*>(args.stats)[row * kTopkStats + k] = 0;
    }
    return;
  }
  void* const memory = launch.workspace == nullptr
                           ? static_cast<void*>(shared + plan.entries_at)
                           : static_cast<char*>(launch.workspace) + row * plan.workspace_per_row;
  // Operands that need to know which logits are entries: softcaps, sums of logits, outcomes one by one.
  const bool smooths = args.label_smoothing != 0 && (args.ce_weight != 0 || args.stats != nullptr);
  const bool marks_all = !plan.resident || plan.every || smooths || args.student_softcap != 0;
  const int vectors = grid.vectors(columns), begin = min(vectors, team.block * plan.share);
  TopkRow<X>{launch,
             args,
             team,
             *reinterpret_cast<RowNumbers*>(shared + kScratchBytes),
             row,
             s,
             g,
             Entries(memory, int(args.entries), plan.table),
             Logits<X>{s, grid, columns, begin, min(vectors, begin + plan.share), float(args.student_softcap),
                       plan.resident ? reinterpret_cast<uint4*>(shared + plan.row_at) : nullptr,
                       reinterpret_cast<uint32_t*>(shared + kFixedBytes), plan.marks * 32 / kLanes<X>, marks_all}}
      .run(label);
}

}  // namespace cuda
}  // namespace kdk
