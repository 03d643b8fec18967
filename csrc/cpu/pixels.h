// Rows that lie next to each other, as those of (B, C, H, W) do: a pixel's logits are a plane apart, and neighbours
// fill a vector. Every lane is a row with numbers of its own; nothing is summed across lanes, and nothing transposed.
#pragma once

#include "numbers.h"
#include "summand.h"
#include "teacher.h"

#include <algorithm>

namespace kdk {
inline namespace KDK_ISA {

// Rows that are worked on at once: whole cache lines of every plane, while what is kept of them fits the first caches.
constexpr int64_t kMostPixels = 64;
constexpr int64_t kPixelScratchBytes = 64 << 10;

template <class C>
int64_t pixels_at_once(int64_t columns) {
  const int64_t fitting = kPixelScratchBytes / int64_t(3 * sizeof(C)) / columns / kLanes<C> * kLanes<C>;
  return std::max<int64_t>(kLanes<C>, std::min<int64_t>(kMostPixels, fitting));
}

// One number for each pixel.
template <class C>
struct OfPixels {
  C at[kMostPixels];
  KDK_INLINE Vec<C> operator[](int64_t k) const { return load<Vec<C>>(at + k); }
};

// Some neighbours: their numbers, and their logits [columns, width] in C.
template <class C>
struct Pixels {
  using V = Vec<C>;
  const PixelArgs& args;
  const int64_t width = pixels_at_once<C>(args.columns), n = args.columns;
  int64_t batch = 0, first = 0, count = 0;  // pixels first to first + count of an image
  C *s, *t, *e;
  OfPixels<C> unit_s, unit_t, param, rest, kd, weight, ce, z;
  int64_t labels[kMostPixels];
  bool counts[kMostPixels];

  explicit Pixels(const PixelArgs& arguments) : args(arguments) {
    Scratch<C>& scratch = Scratch<C>::mine();
    s = scratch.get(kStudentRow, n * width), t = scratch.get(kTeacherRow, n * width);
    e = scratch.get(kEs, n * width);
  }

  void take_numbers() {
    constexpr bool fp64 = sizeof(C) == 8;
    for (int64_t k = 0; k < width; ++k) {
      // The lanes behind the last pixel repeat it.
      const int64_t row = batch * args.length + first + std::min(k, count - 1);
      labels[k] = args.labels == nullptr ? 0 : args.labels[row];
      counts[k] = args.labels == nullptr || labels[k] != args.ignore_index;
      const RowNumbers num = row_numbers<C>(args, row, args.scale * per_row(args.row_weight, row, 1.0, fp64));
      unit_s.at[k] = C(num.student_scale * kLn2), unit_t.at[k] = C(num.teacher_scale * kLn2);
      param.at[k] = C(num.param0), rest.at[k] = C(1 - num.param0);
      kd.at[k] = C(num.kd * num.tau), weight.at[k] = C(num.weight), ce.at[k] = C(num.ce), z.at[k] = C(num.z);
    }
  }

  // The planes of one tensor, with their biases and after their softcap.
  template <class Id>
  void take_logits(const LogitsView& view, int64_t stride, Id id, bool probs, const void* bias, double cap, C* out) {
    with_dtype(view.dtype, [&](auto of_type) {
      using X = decltype(of_type);
      const X* planes = static_cast<const X*>(view.data) + batch * view.stride_b + first * view.stride_l;
      for (int64_t j = 0; j < n; ++j) {
        const int64_t plane = id(j);
        C* const to = out + j * width;
        if (plane < 0) {
          const C nothing =
              plane == -1 ? (probs ? C(0) : -std::numeric_limits<C>::infinity()) : std::numeric_limits<C>::quiet_NaN();
          std::fill(to, to + width, nothing);
        } else {
          const X* from = planes + plane * stride;
          int64_t k = 0;
          for (; k + kLanes<C> <= count; k += kLanes<C>) store(to + k, widened<C>(from + k));
          if (k < width) {
            // Lanes behind the last pixel have numbers too, of which nothing is used.
            for (; k < count; ++k) to[k] = C(to_compute(from[k]));
            std::fill(to + k, to + width, C(0));
          }
        }
        const C plus = bias == nullptr ? C(0) : static_cast<const C*>(bias)[j];
        if (!probs && bias == nullptr && cap == 0) continue;
        for (int64_t k = 0; k < width; k += kLanes<C>) {
          V x = load<V>(to + k);
          if (probs) x = log_of_probability<C>(x);
          if (bias != nullptr) x += plus;
          if (cap != 0) x = C(cap) * tanh_fast(x * C(1 / cap));
          store(to + k, x);
        }
      }
    });
  }

  void take() {
    take_numbers();
    const ColumnArgs& of = args.of_columns;
    take_logits(
        args.student, args.student_stride, [](int64_t j) { return j; }, false, of.student_bias, args.student_softcap,
        s);
    const bool probs = args.teacher_form == TeacherForm::kProbs;
    const auto column = [&](int64_t j) {
      const int64_t id = of.teacher_columns == nullptr ? j : of.teacher_columns[j];
      return id < of.teacher_width ? std::max<int64_t>(id, -2) : -2;
    };
    take_logits(args.teacher, args.teacher_stride, column, probs, of.teacher_bias, probs ? 0 : args.teacher_softcap, t);
  }

  KDK_INLINE V highest(const C* x) const {
    V high = V{} - std::numeric_limits<C>::max();
    for (int64_t j = 0; j < n; ++j) high = max_keep_nan(high, load<V>(x + j * width));
    return high;
  }
  KDK_INLINE V sum_of_exponentials(const C* x, V high, V unit) const {
    V z = {};
    for (int64_t j = 0; j < n; ++j) z += kdk_exp((load<V>(x + j * width) - high) * unit);
    return z;
  }

  // Of the sum of a row that has no distribution the logarithm is NaN; kdk_log would make a number of it.
  KDK_INLINE static V log_of_sum(V z) {
    return kdk_where(z > V{}, kdk_log(z), V{} + std::numeric_limits<C>::quiet_NaN());
  }

  // A vector of pixels, from lane k on: their losses, statistics, and their gradient in place of the logits.
  template <class Summand>
  KDK_INLINE void work(int64_t k, Summand summand, bool wants_grad, C* losses, C (*stats)[kMostPixels]) {
    const V zero = {}, one = zero + C(1);
    C *const s_k = s + k, *const t_k = t + k, *const e_k = e + k;
    const bool free = args.student_log_probs;
    const bool some = args.kd_weight != 0 || stats != nullptr;
    V loss = {}, d = {}, score_sum = {}, poison = {};
    const V high_s = free ? zero : highest(s_k), unit = free ? one : unit_s[k];
    V log_zs = {};
    if (some) {
      const V high_t = highest(t_k), unit_of_t = unit_t[k];
      const V log_zt = log_of_sum(sum_of_exponentials(t_k, high_t, unit_of_t));
      if (!free) log_zs = log_of_sum(sum_of_exponentials(s_k, high_s, unit));
      V mass = {};
      const Params<V> params{param[k], zero + C(args.param1), rest[k]};
      Distances<V> sums;
      V best_s = zero - std::numeric_limits<C>::infinity(), best_t = best_s, at_s = {}, at_t = {};
      for (int64_t j = 0; j < n; ++j) {
        C *const s_j = s_k + j * width, *const t_j = t_k + j * width;
        const V logq = (load<V>(s_j) - high_s) * unit - log_zs, logp = (load<V>(t_j) - high_t) * unit_of_t - log_zt;
        const V q = kdk_exp(logq), p = kdk_exp(logp);
        V value, score;
        summand(params, p, logp, q, logq, value, score);
        d += value;
        score_sum += score;
        mass += q;
        if (stats != nullptr) {
          sums.add(p, logp, q, logq);
          const V index = zero + C(j);
          at_s = kdk_where(logq > best_s, index, at_s), best_s = max_keep_nan(best_s, logq);
          at_t = kdk_where(logp > best_t, index, at_t), best_t = max_keep_nan(best_t, logp);
        }
        store(t_j, score);
        store(e_k + j * width, q);
      }
      // Functors see no NaN in a row, and make a number of it.
      poison = (mass + log_zt) * C(0);
      d += poison;
      if (!free) d = not_negative(d);
      if (stats != nullptr) {
        const V columns[] = {d,
                             zero,
                             zero,
                             free ? sums.forward : not_negative(sums.forward),
                             free ? sums.reverse : not_negative(sums.reverse),
                             sums.entropy_p,
                             sums.entropy_q,
                             kdk_where(at_s == at_t, one, zero),
                             sums.overlap};
        for (int column = 0; column < kStats; ++column) store(stats[column] + k, columns[column]);
      }
      // A term of weight 0 counts nothing, be it NaN.
      if (args.kd_weight != 0) loss = kdk_where(kd[k] != zero, kd[k] * d, zero);
    }
    V hard = {}, high = {}, log_z = {};
    // The exponentials that cross entropy needs are those of the divergence.
    const bool at_1 = some && !free && args.student_temperature.data == nullptr && args.temperature == 1;
    const bool any_ce = args.ce_weight != 0, any_z = args.z_loss_weight != 0;
    const bool values_ce = args.values_ce(args.ce_weight);
    if (any_ce || any_z || stats != nullptr) {
      high = free && stats != nullptr ? highest(s_k) : high_s;
      if (at_1) {
        log_z = log_zs;
      } else if (!free || stats != nullptr) {
        log_z = log_of_sum(sum_of_exponentials(s_k, high, one));
      }
      const V lse = high + log_z;
      V cross_entropy = {};
      if (values_ce) {
        const C smoothing = C(args.label_smoothing);
        V picked = {}, mean = {};
        const V reference = free ? zero : high;
        for (int i = 0; i < kLanes<C>; ++i) {
          const int64_t label = labels[k + i];
          picked[i] = label >= 0 && label < n ? s_k[label * width + i] : std::numeric_limits<C>::quiet_NaN();
        }
        if (smoothing != 0) {
          for (int64_t j = 0; j < n; ++j) mean += load<V>(s_k + j * width) - reference;
          mean = mean * C(1 / double(n));
        }
        cross_entropy = free ? zero : log_z;
        if (smoothing != 1) cross_entropy -= (picked - reference) * (1 - smoothing);
        if (smoothing != 0) cross_entropy -= mean * smoothing;
      }
      if (any_ce) loss += kdk_where(ce[k] != zero, ce[k] * cross_entropy, zero);
      if (any_z) loss += kdk_where(z[k] != zero, z[k] * lse * lse, zero);
      if (stats != nullptr) store(stats[1] + k, cross_entropy), store(stats[2] + k, lse);
      // Of log-probabilities cross entropy has no normaliser.
      hard = free ? zero : weight[k] * (ce[k] + kdk_where(z[k] != zero, z[k] * lse * C(2), zero));
    }
    store(losses + k, loss * weight[k]);
    if (!wants_grad) return;
    const V factor = weight[k] * kd[k] * unit, of_kd = kdk_where(kd[k] != zero, one, zero);
    const V total = poison + (free ? zero : Summand::kOfTeacher ? zero + score_total(summand) : score_sum);
    const V each = any_ce ? weight[k] * ce[k] * C(args.label_smoothing / double(n)) : zero;
    const C inverse_cap = args.student_softcap == 0 ? C(0) : C(1 / args.student_softcap);
    const bool has_kd = args.kd_weight != 0, has_hard = (any_ce || any_z) && !free;
    for (int64_t j = 0; j < n; ++j) {
      C* const s_j = s_k + j * width;
      V g = zero - each;
      if (has_kd) {
        const V of_row = load<V>(t_k + j * width) - load<V>(e_k + j * width) * total;
        g += kdk_where(of_kd != zero, of_row * factor, zero);
      }
      if (has_hard) g += (at_1 ? load<V>(e_k + j * width) : kdk_exp(load<V>(s_j) - high - log_z)) * hard;
      if (inverse_cap != 0) {
        // The label's part is not in it yet.
        store(e_k + j * width, slope_of_cap(load<V>(s_j), inverse_cap));
      }
      store(s_j, g);
    }
    if (any_ce) {
      for (int i = 0; i < kLanes<C>; ++i) {
        const int64_t label = labels[k + i];
        if (label >= 0 && label < n)
          s_k[label * width + i] -= weight.at[k + i] * ce.at[k + i] * C(1 - args.label_smoothing);
      }
    }
    if (inverse_cap != 0)
      for (int64_t j = 0; j < n; ++j) store(s_k + j * width, load<V>(s_k + j * width) * load<V>(e_k + j * width));
  }
  KDK_INLINE static V not_negative(V x) { return kdk_where(x < V{}, V{}, x); }
  template <bool OF_TEACHER>
  static C score_total(LinearSummand<OF_TEACHER> summand) {
    return C(summand.k.c_pq);
  }
  template <class F>
  static C score_total(FunctorSummand<F>) {
    return 0;
  }

  void give(C* losses, C (*stats)[kMostPixels]) {
    const int64_t row = batch * args.length + first;
    for (int64_t k = 0; k < count; ++k) {
      put<C>(args.loss, row + k, counts[k] ? losses[k] : 0);
      for (int column = 0; stats != nullptr && column < kStats; ++column)
        if (counts[k]) put<C>(args.stats, (row + k) * kStats + column, stats[column][k]);
    }
    if (!args.wants_grad) return;
    bool all_count = true;
    for (int64_t k = 0; k < count; ++k) all_count = all_count && counts[k];
    with_dtype(args.dstudent.dtype, [&](auto of_type) {
      using X = decltype(of_type);
      if constexpr (std::is_same_v<C, typename Io<X>::C>) {
        X* planes =
            static_cast<X*>(args.dstudent.data) + batch * args.dstudent.stride_b + first * args.dstudent.stride_l;
        for (int64_t j = 0; j < args.width; ++j, planes += args.dstudent_stride) {
          C* const g = s + j * width;
          if (j >= n) {
            fill_zero(planes, 0, count);
            continue;
          }
          for (int64_t k = 0; k < count && !all_count; ++k)
            if (!counts[k]) g[k] = 0;
          int64_t k = 0;
          for (; k + kLanes<C> <= count; k += kLanes<C>) Io<X>::narrow(planes + k, load<V>(g + k));
          for (; k < count; ++k) from_compute(g[k], planes + k);
        }
      }
    });
  }
};

template <class C>
void pixel_rows(const PixelArgs& args, int64_t begin, int64_t end) {
  Pixels<C> pixels(args);
  alignas(64) C losses[kMostPixels];
  alignas(64) C stats[kStats][kMostPixels];
  with_summand(args.divergence, [&](auto summand) {
    for (int64_t row = begin; row < end; row += pixels.count) {
      pixels.batch = row / args.length;
      pixels.first = row - pixels.batch * args.length;
      pixels.count = std::min({pixels.width, args.length - pixels.first, end - row});
      pixels.take();
      auto* const of_stats = args.stats == nullptr ? nullptr : stats;
      for (int64_t k = 0; k < pixels.count; k += kLanes<C>) pixels.work(k, summand, args.wants_grad, losses, of_stats);
      pixels.give(losses, of_stats);
    }
  });
}

}  // namespace KDK_ISA
}  // namespace kdk
