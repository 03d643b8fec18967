// A teacher's row as logits: capped, of probabilities, standardised, or a mixture of several teachers.
#pragma once

#include "student.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {

// The mean of a row is centre + rest, where x - centre is exact as far as C can be. Where unit is not 1, the row was
// replaced by what it is over that power of two.
template <class C>
struct Moments {
  C centre;
  double rest, std, unit = 1;
};

// Moments of a row whose squares, or whose sum, leave the range of C, or which next to its mean is hardly anything:
// replaced by its deviations from the mean over a power of two. Halves, for the range of a row may pass the largest
// number.
template <class C>
__attribute__((noinline)) Moments<C> rescaled_moments(C* x, int64_t n) {
  double low = x[0], high = x[0], nan = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double value = x[j];
    low = std::min(low, value), high = std::max(high, value);
    // Of an infinite number too.
    nan += value - value;
  }
  const double extent = high / 2 - low / 2;
  if (nan != 0 || !(extent > 0)) return {C(low), 0, nan + 1};
  int exponent;
  std::frexp(extent, &exponent);
  const auto above = [&](int64_t j) { return std::ldexp(double(x[j]) / 2 - low / 2, -exponent); };
  double mean = 0, squares = 0;
  for (int64_t j = 0; j < n; ++j) mean += above(j);
  mean /= double(n);
  for (int64_t j = 0; j < n; ++j) {
    const double deviation = above(j) - mean;
    squares += deviation * deviation;
    x[j] = C(deviation);
  }
  return {C(0), 0, std::sqrt(squares / double(std::max<int64_t>(n - 1, 1))), std::ldexp(1.0, exponent + 1)};
}

// Mean and standard deviation, of n - 1 degrees of freedom, of n numbers with about this sum; a constant row counts as
// having deviation 1.
template <class C>
Moments<C> moments(C* x, int64_t n, double sum) {
  const C centre = C(sum / double(n));
  const int64_t whole = n - n % kLanes<C>;
  const auto deviation = [&](int64_t j) KDK_LAMBDA_INLINE { return load<Vec<C>>(x + j) - centre; };
  double rest = sum_over_row<C>(whole, deviation);
  double squares = sum_over_row<C>(whole, [&](int64_t j) KDK_LAMBDA_INLINE {
    const Vec<C> d = deviation(j);
    return d * d;
  });
  for (int64_t j = whole; j < n; ++j) {
    const double d = double(x[j]) - double(centre);
    rest += d, squares += d * d;
  }
  rest /= double(n);
  const double variance = (squares - double(n) * rest * rest) / double(std::max<int64_t>(n - 1, 1));
  // Far from where squares in C leave its range, and no difference of numbers that are nearly the same.
  constexpr double smallest = double(std::numeric_limits<C>::min()) * 0x1p40;
  constexpr double largest = double(std::numeric_limits<C>::max()) * 0x1p-40;
  if (!(variance > smallest && variance < largest && variance * double(n) > 0x1p-10 * squares))
    return rescaled_moments(x, n);
  return {centre, rest, std::sqrt(variance)};
}

// The logarithm of probabilities, which may be 0, subnormal or NaN.
template <class C>
KDK_INLINE Vec<C> log_of_probability(Vec<C> p) {
  // kdk_log takes no numbers below the normal range, and of NaN it makes a number.
  const Vec<C> zero = {}, low = zero - std::numeric_limits<C>::infinity(), nan = low - low;
  const C smallest = std::numeric_limits<C>::min(), raised = C(0x1p64), log_raised = C(64 * kLn2);
  const auto small = p < smallest;
  const Vec<C> log_p = kdk_log(kdk_where(small, p * raised, p)) - kdk_where(small, zero + log_raised, zero);
  return kdk_where(p > zero, log_p, kdk_where(p == zero, low, nan));
}

// A teacher's row as logits in C, seen by map; returns their sum.
template <class C, class Map>
double logits_of_teacher(const DenseArgs& args, int k, int64_t row, C* out, Map map) {
  const LogitsView& view = args.teachers[k];
  if (args.teacher_form != TeacherForm::kProbs)
    return capped_row(view, row, args.length, args.columns, args.teacher_softcap, out, map);
  return widen_row(view, row, args.length, args.columns, out,
                   [=](int64_t j, Vec<C> p) KDK_LAMBDA_INLINE { return map(j, log_of_probability<C>(p)); });
}

// Of a row or a bias of n numbers the vector from j on, filled up with a number of which nothing is used.
template <class C>
KDK_INLINE Vec<C> load_within(const C* x, int64_t j, int64_t n, C filling = 0) {
  if (j + kLanes<C> <= n) return load<Vec<C>>(x + j);
  C last[kLanes<C>];
  std::fill(last, last + kLanes<C>, filling);
  std::copy(x + j, x + n, last);
  return load<Vec<C>>(last);
}

// A teacher's row in C, of the columns that the student's are compared with; a probability of 0 where there is none.
template <class C>
void gather_columns(const DenseArgs& args, int64_t row, C* out) {
  const ColumnArgs& columns = args.of_columns;
  const C nothing = args.teacher_form == TeacherForm::kProbs ? C(0) : -std::numeric_limits<C>::infinity();
  const LogitsView& view = args.teachers[0];
  with_dtype(view.dtype, [&](auto of_type) {
    const auto* t = row_pointer<decltype(of_type)>(view, row, args.length);
    for (int64_t j = 0; j < args.columns; ++j) {
      const int64_t id = columns.teacher_columns[j];
      // A column out of range is nobody's; its number must not be one.
      out[j] = id >= 0 && id < columns.teacher_width ? C(to_compute(t[id]))
               : id == -1                            ? nothing
                                                     : std::numeric_limits<C>::quiet_NaN();
    }
  });
}

// The row of a single teacher with a bias, or of other columns, as logits in C.
template <class C>
__attribute__((noinline)) void changed_teacher(const DenseArgs& args, int64_t row, C* out) {
  using V = Vec<C>;
  const int64_t n = args.columns;
  const C* bias = static_cast<const C*>(args.of_columns.teacher_bias);
  if (args.of_columns.teacher_columns != nullptr) {
    gather_columns(args, row, out);
  } else {
    widen_row(args.teachers[0], row, args.length, n, out, AsIs());
  }
  const bool probs = args.teacher_form == TeacherForm::kProbs;
  const double cap = probs ? 0 : args.teacher_softcap;
  for (int64_t j = 0; j < n; j += kLanes<C>) {
    V x = load<V>(out + j);
    if (probs) x = log_of_probability<C>(x);
    if (bias != nullptr) x += load_within(bias, j, n);
    if (cap != 0) x = C(cap) * tanh_fast(x * C(1 / cap));
    store(out + j, x);
  }
}

template <class C>
double mixture_weight(const DenseArgs& args, int64_t row, int k) {
  return double(static_cast<const C*>(args.mixture_weights)[row * args.mixture_stride_n + k * args.mixture_stride_m]);
}

// The logarithm of the mixture of the teachers' probabilities: one exponential for each of them and one logarithm.
// False where a probability is too small for that, as next to a logit of -inf: its logarithm may matter all the same.
template <class C>
bool mixture_of_probabilities(const DenseArgs& args, int64_t row, double scale, C* out) {
  using V = Vec<C>;
  Scratch<C>& scratch = Scratch<C>::mine();
  const int64_t n = args.columns;
  C *logits = scratch.get(kOtherRow, n), *e = scratch.get(kGradientRow, n + Row<C>::kBlock);
  // The mixture so far is out * held + e * share: added up when the next one comes, and with its logarithm at the end.
  C held = 0, share = 0;
  int64_t teachers = 0;
  const auto mixed = [&](int64_t j) KDK_LAMBDA_INLINE { return load<V>(out + j) * held + load<V>(e + j) * share; };
  for (int k = 0; k < args.num_teachers; ++k) {
    const double weight = mixture_weight<C>(args, row, k);
    if (weight == 0) continue;
    if (teachers > 1) {
      for (int64_t j = 0; j < n; j += kLanes<C>) store(out + j, mixed(j));
      held = 1;
    }
    const double sum = logits_of_teacher(args, k, row, logits, AsIs());
    const double own_scale = args.standardize ? scale / moments(logits, n, sum).std : scale;
    // In the student's place of a row.
    C* const to = teachers == 0 ? out : e;
    Affine<C> affine;
    const double z = sweep_student<false>(Row<C>(logits, logits, n, 0), n, own_scale, affine, to, to);
    if (!(z > 0 && z < std::numeric_limits<double>::infinity())) return false;
    (teachers == 0 ? held : share) = C(weight / z);
    ++teachers;
  }
  if (teachers == 0) return false;
  if (teachers == 1) std::fill(e, e + n + kLanes<C>, C(0));
  V lowest = V{} + C(1);
  const int64_t whole = n - n % kLanes<C>;
  for (int64_t j = 0; j < whole; j += kLanes<C>) {
    const V p = mixed(j);
    lowest = min_of(p, lowest);
    store(out + j, kdk_log(p));
  }
  C least = fold_lanes<C>(lowest, [](auto x, auto y) KDK_LAMBDA_INLINE { return y < x ? y : x; });
  if (whole < n) {
    const V p = mixed(whole);
    for (int64_t j = whole; j < n; ++j) least = std::min<C>(least, p[j - whole]);
    store(out + whole, kdk_log(p));
  }
  return least > C(0x1p-100);
}

// The teacher's row as logits in C; scale becomes log2(e) / T of that row.
template <class C>
const C* teacher_row(const DenseArgs& args, int64_t row, double& scale) {
  Scratch<C>& scratch = Scratch<C>::mine();
  const int64_t n = args.columns;
  C* out = scratch.get(kTeacherRow, n);
  if (args.mixture == Mixture::kNone) {
    if (args.of_columns.change_teacher()) {
      changed_teacher(args, row, out);
      return out;
    }
    const double sum = logits_of_teacher(args, 0, row, out, AsIs());
    if (args.standardize) scale /= moments(out, n, sum).std;
    return out;
  }
  const bool logits = args.mixture == Mixture::kLogits;
  if (!logits && mixture_of_probabilities(args, row, scale, out)) {
    scale = kLog2e;
    return out;
  }
  C* one = scratch.get(kOtherRow, n);
  const Vec<C> low = Vec<C>{} - std::numeric_limits<C>::infinity(), zero = {};
  std::fill(out, out + n + kLanes<C>, logits ? C(0) : -std::numeric_limits<C>::infinity());
  for (int k = 0; k < args.num_teachers; ++k) {
    const double weight = mixture_weight<C>(args, row, k);
    if (weight == 0) continue;
    const C w = C(weight);
    if (logits && !args.standardize) {
      if (w > 0) {
        logits_of_teacher(args, k, row, out,
                          [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE { return load<Vec<C>>(out + j) + w * x; });
      } else {
        // An outcome that one teacher rules out stays ruled out, whatever its weight, and an infinite logit is no
        // number.
        logits_of_teacher(args, k, row, out, [=](int64_t j, Vec<C> x) KDK_LAMBDA_INLINE {
          return kdk_where(x == low, low, kdk_where(x == -low, low - low, load<Vec<C>>(out + j) + w * x));
        });
      }
      continue;
    }
    const double sum = logits_of_teacher(args, k, row, one, AsIs());
    double own_scale = scale;
    if (args.standardize) {
      const Moments<C> m = moments(one, n, sum);
      own_scale /= m.std;
      const C mean = m.centre, inverse = C(1 / m.std);
      if (logits) {
        for (int64_t j = 0; j < n; j += kLanes<C>)
          // The rest of the mean is the same for all, and so nothing to a softmax.
          store(out + j, load<Vec<C>>(out + j) + w * ((load<Vec<C>>(one + j) - mean) * inverse));
        continue;
      }
    }
    // log(e^u + e^v) with u the mixture so far, v = log w + log p of this teacher.
    const Affine<C> a = affine<C>(own_scale, maximum(one, n));
    const C offset = C(-log2_sum_exp(one, n, a)), ln2 = C(kLn2), log_weight = C(std::log(weight));
    for (int64_t j = 0; j < n; j += kLanes<C>) {
      const Vec<C> u = load<Vec<C>>(out + j), v = (a(load<Vec<C>>(one + j)) + offset) * ln2 + log_weight;
      const Vec<C> high = max_keep_nan(u, v), under = min_of(u, v) - high;
      const Vec<C> sum = high + kdk_log(1 + kdk_exp(kdk_where(high == low, zero, under)));
      // The maximum forgets a NaN in u.
      store(out + j, kdk_where(u != u, u, kdk_where(high == low, low, sum)));
    }
  }
  if (!logits) scale = kLog2e;
  return out;
}

}  // namespace KDK_ISA
}  // namespace kdk
