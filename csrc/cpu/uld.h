// Universal logit distillation: the area between the two rows of probabilities in order, and its gradient.
//
// The probabilities of a row are steps over the ranks of its columns. Between two ends of steps, of either side, both
// are constant: each such piece adds its length times the difference, and its sign to the student's step.
#pragma once

#include "patterns.h"
#include "steps.h"
#include "widen.h"

namespace kdk {
inline namespace KDK_ISA {
namespace uld {

// The difference that rounding may leave between two probabilities that are equal, as where the logits of the models
// differ by a constant: less than this times the student's has no sign.
template <class C>
constexpr C kNoDifference = 64 * std::numeric_limits<C>::epsilon();

// A part of the student's steps, and the pieces in it so far.
template <class C>
struct Walk {
  int64_t s, last, t;  // the steps at `rank`, and where the student's end
  int32_t rank, sign;  // the sum of signs so far, which is left in each step
  double area;

  bool done() const { return s == last; }
  KDK_INLINE void step(const int32_t* ends_s, const C* q, const int32_t* ends_t, const C* p, int32_t* signs) {
    const int32_t end_s = ends_s[s], end_t = ends_t[t], end = std::min(end_s, end_t), length = end - rank;
    const C difference = q[s] - p[t], least = kNoDifference<C> * q[s];
    area += double(C(length) * std::abs(difference));
    sign += length * (int32_t(difference > least) - int32_t(-difference > least));
    signs[s] = sign;
    rank = end;
    s += end == end_s;
    t += end == end_t;
  }
};

// The area, and the running sums of signs of the student's steps. Two walks at a time: one would wait for its own
// steps, and of more the registers do not hold the places.
template <class C>
double between(Steps<C>& student, Steps<C>& teacher, int32_t* signs) {
  constexpr int walks = 2;
  // Past its last column the teacher has a probability of 0.
  teacher.ends[size_t(teacher.count)] = std::numeric_limits<int32_t>::max();
  teacher.probs[size_t(teacher.count)] = 0;
  Walk<C> walk[walks];
  const auto teachers = teacher.ends.begin();
  for (int k = 0; k < walks; ++k) {
    const int64_t first = student.count * k / walks, rank = student.begin(first);
    const int64_t t = std::upper_bound(teachers, teachers + teacher.count, int32_t(rank)) - teachers;
    walk[k] = {first, student.count * (k + 1) / walks, t, int32_t(rank), 0, 0};
  }
  const int32_t *const ends_s = student.ends.data(), *const ends_t = teacher.ends.data();
  const C *const q = student.probs.data(), *const p = teacher.probs.data();
  Walk<C> one = walk[0], other = walk[1];
  while (!(one.done() | other.done())) {
    one.step(ends_s, q, ends_t, p, signs);
    other.step(ends_s, q, ends_t, p, signs);
  }
  walk[0] = one, walk[1] = other;
  double area = 0;
  for (Walk<C>& rest : walk) {
    while (!rest.done()) rest.step(ends_s, q, ends_t, p, signs);
    area += rest.area;
  }
  // The second walk began at 0.
  const int32_t before = walk[0].sign;
  for (int64_t k = student.count / walks; k < student.count; ++k) signs[k] += before;
  // The teacher's columns past the student's last.
  int32_t rank = student.ends[size_t(student.count - 1)];
  for (int64_t t = walk[walks - 1].t; t < teacher.count; ++t) {
    area += double(p[t]) * (ends_t[t] - rank);
    rank = ends_t[t];
  }
  return area;
}

// A table of what to write by the bits of a logit.
template <class X>
struct Table {
  std::vector<X> at = std::vector<X>(65536);
  static Table& mine() {
    static thread_local Table table;
    return table;
  }
  void look_up(const X* row, int64_t n, X* out) const {
    typedef int16_t Eight __attribute__((vector_size(16)));
    const auto* const table = reinterpret_cast<const int16_t*>(at.data());
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
      const X* x = row + j;
      const Eight eight = {table[x[0].bits], table[x[1].bits], table[x[2].bits], table[x[3].bits],
                           table[x[4].bits], table[x[5].bits], table[x[6].bits], table[x[7].bits]};
      store(out + j, eight);
    }
    for (; j < n; ++j) out[j] = at[row[j].bits];
  }
};

// Writes the gradient of a row. slopes: of the steps, what the probability of a column is multiplied by.
template <class X, class C>
void write(const X* row, int64_t n, double scale, Found found, const Steps<C>& steps, const C* slopes, X* out) {
  if constexpr (sizeof(X) == 2) {
    Table<X>& table = Table<X>::mine();
    for (int64_t k = 0; k < steps.count; ++k)
      from_compute(steps.probs[size_t(k)] * slopes[k], &table.at[size_t(steps.keys[size_t(k)])]);
    table.at[Counters<X>::kSign] = table.at[0];
    table.look_up(row, n, out);
  } else if (found == Found::kSorted) {
    int32_t r = 0;
    for (int64_t k = 0; k < steps.count; ++k) {
      const C gradient = steps.probs[size_t(k)] * slopes[k];
      for (; r < steps.ends[size_t(k)]; ++r) out[steps.order[size_t(r)]] = gradient;
    }
  } else if constexpr (std::is_same_v<X, float>) {
    Bins& bins = Bins::mine();
    const C inverse = C(std::exp2(-steps.log2_z));
    float* const of_bin = Scratch<float>::mine().get(kTerms, kBins);
    float* const by_column = Scratch<float>::mine().get(kE1, kTileElements);
    for (int64_t k = 0; k < steps.count; ++k) of_bin[steps.keys[size_t(k)]] = slopes[k] * inverse;
    const Affine<float> as = steps.affine;
    bins.tiles(row, n, Bins::Ruler(steps.top, scale), [&](int64_t begin, int64_t end) KDK_LAMBDA_INLINE {
      const uint32_t* const places = bins.places.data();
      for (int64_t k = 0; k < end - begin; ++k) by_column[k] = of_bin[places[k] >> kPlaceBits];
      int64_t k = 0;
      const auto gradient = [&](VecF x) KDK_LAMBDA_INLINE {
        return exp2_fast<5>(clamp_exponent(as(x))) * load<VecF>(by_column + k);
      };
      for (; begin + k + kLanes<float> <= end; k += kLanes<float>)
        store(out + begin + k, gradient(load<VecF>(row + begin + k)));
      float rest[kLanes<float>] = {};
      std::copy(row + begin + k, row + end, rest);
      store(rest, gradient(load<VecF>(rest)));
      std::copy(rest, rest + (end - begin - k), out + begin + k);
    });
  }
}

template <class X>
void write_nan(int64_t n, X* out) {
  X nan;
  from_compute(typename Io<X>::C(std::numeric_limits<float>::quiet_NaN()), &nan);
  std::fill(out, out + n, nan);
}

}  // namespace uld

template <class X>
void uld_rows(const UldArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  constexpr bool fp64 = sizeof(C) == 8;
  std::vector<int32_t> signs;
  std::vector<C> slopes;
  for_rows<X>(args, begin, end, [&](int64_t row, int64_t, double weight, X* out) {
    const double temperature = per_row(args.student_temperature, row, args.temperature, fp64);
    const double of_teacher = per_row(args.teacher_temperature, row, args.teacher_temperature_value, fp64);
    const double scale = kLog2e / temperature;
    Steps<C>&student = Steps<C>::mine(0), &teacher = Steps<C>::mine(1);
    const X* s = row_pointer<X>(args.student, row, args.length);
    with_dtype(args.teacher.dtype, [&](auto type) {
      const auto* t = row_pointer<decltype(type)>(args.teacher, row, args.length);
      find_steps(t, args.teacher_columns, kLog2e / of_teacher, args.exact, teacher);
    });
    const Found found = find_steps(s, args.columns, scale, args.exact, student);
    if (!student.sound() || !teacher.sound()) {
      if (out != nullptr) uld::write_nan(args.columns, out);
      return std::numeric_limits<double>::quiet_NaN();
    }
    signs.resize(size_t(student.count));
    const double area = uld::between(student, teacher, signs.data());
    if (out == nullptr) return area;
    slopes.resize(size_t(student.count));
    const int32_t *const sum = signs.data(), *const ends = student.ends.data();
    const double mean =
        student.mean_of([&](int64_t k, int32_t) KDK_LAMBDA_INLINE { return k == 0 ? sum[0] : sum[k] - sum[k - 1]; });
    const C factor = C(weight / temperature), less = C(mean);
    C* const slope = slopes.data();
    slope[0] = factor * (C(sum[0]) / C(ends[0]) - less);
    for (int64_t k = 1; k < student.count; ++k)
      slope[k] = factor * (C(sum[k] - sum[k - 1]) / C(ends[k] - ends[k - 1]) - less);
    uld::write(s, args.columns, scale, found, student, slopes.data(), out);
    return area;
  });
}

}  // namespace KDK_ISA
}  // namespace kdk
