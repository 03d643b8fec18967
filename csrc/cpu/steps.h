// A row of logits as steps: the values it has, the largest first, each with its number of columns and the probability
// of one of them. Statistics of the order of a row are sums over steps.
//
// 16-bit logits are counted by their bits: 65,536 counters, of which a row of 128,256 touches some thousands, and
// exponentials of those values alone. Logits in fp32 are counted in bins of equal width, with their mean place in the
// bin; or, as those in fp64 are, sorted.
#pragma once

#include "reduce.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace kdk {
inline namespace KDK_ISA {

template <class C>
struct Steps {
  std::vector<int32_t> ends;   // of the columns in order, where each step ends
  std::vector<C> probs;        // of one column of the step
  std::vector<int32_t> keys;   // of the step: bits, or a bin
  std::vector<int32_t> order;  // columns, the largest logit first: of a sorted row
  int64_t count = 0;
  Affine<C> affine;   // of the exponentials
  double top = 0;     // the largest logit
  double log2_z = 0;  // of their sum; NaN where the row has no distribution

  static Steps& mine(int side) {
    static thread_local Steps steps[2];
    return steps[side];
  }
  bool sound() const { return log2_z == log2_z; }
  int32_t begin(int64_t step) const { return step == 0 ? 0 : ends[size_t(step - 1)]; }
  int32_t columns(int64_t step) const { return ends[size_t(step)] - begin(step); }

  // Room for more steps, and for whole vectors of them.
  void reserve(int64_t steps) {
    if (int64_t(ends.size()) >= steps + kLanes<float>) return;
    ends.resize(size_t(steps + kLanes<float>));
    keys.resize(size_t(steps + kLanes<float>));
    probs.resize(size_t(steps + kLanes<float>));
  }

  // From the steps' logits in probs to their probabilities, which depend on the steps alone: models that agree have
  // equal ones.
  void normalize(double scale) {
    constexpr C infinity = std::numeric_limits<C>::infinity();
    log2_z = std::numeric_limits<double>::quiet_NaN();
    const C largest = probs[0], last = probs[size_t(count - 1)];
    if (!(largest < infinity) || !(largest > -infinity) || last != last) return;
    top = double(largest);
    affine = kdk::affine<C>(scale, top);
    exponentials();
  }
  // From places in probs, as powers of two.
  void exponentials() {
    using V = Vec<C>;
    std::fill(probs.begin() + count, probs.begin() + count + kLanes<C>, -std::numeric_limits<C>::infinity());
    for (int64_t j = 0; j < count; j += kLanes<C>) {
      C* at = probs.data() + j;
      store(at, exp2_fast<5>(clamp_exponent(affine(load<V>(at)))));
    }
    const double z = mean_of([&](int64_t, int32_t columns) KDK_LAMBDA_INLINE { return columns; });
    log2_z = std::log2(z);
    // Not by an inverse: what is alone has a probability of 1.
    C* const p = probs.data();
    for (int64_t j = 0; j < count; ++j) p[j] = C(double(p[j]) / z);
  }
  // The sum over the steps of a probability times value(step, columns), in four chains of additions.
  template <class Value>
  KDK_INLINE double mean_of(Value value) const {
    const C* const p = probs.data();
    const int32_t* const end = ends.data();
    double sums[4] = {double(p[0]) * value(0, end[0])};
    int64_t j = 1;
    for (; j + 4 <= count; j += 4)
      for (int64_t k = 0; k < 4; ++k) sums[k] += double(p[j + k]) * value(j + k, end[j + k] - end[j + k - 1]);
    for (; j < count; ++j) sums[0] += double(p[j]) * value(j, end[j] - end[j - 1]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

// Counters of all 16-bit numbers; between rows they are 0.
template <class X>
struct Counters {
  static constexpr int32_t kSign = 0x8000;
  std::vector<int32_t> counts = std::vector<int32_t>(65536);

  static Counters& mine() {
    static thread_local Counters counters;
    return counters;
  }

  // Counts a row; positive numbers have bits up to `positive`, and negative ones up to `negative`, where there are any.
  void count(const X* row, int64_t n, int32_t& positive, int32_t& negative) {
    constexpr int64_t lanes = kVectorBytes / 2;
    VecS high = VecS{} - 1;
    VecW far = {};
    int64_t j = 0;
    for (; j + lanes <= n; j += lanes) {
      high = max_of(high, load<VecS>(row + j));
      const VecW bits = load<VecW>(row + j);
      far = bits > far ? bits : far;
    }
    positive = -1, negative = 0;
    for (int64_t k = 0; k < lanes; ++k) {
      positive = std::max(positive, int32_t(high[k]));
      negative = std::max(negative, int32_t(far[k]));
    }
    for (; j < n; ++j) {
      positive = std::max(positive, int32_t(int16_t(row[j].bits)));
      negative = std::max(negative, int32_t(row[j].bits));
    }
    int32_t* const at = counts.data();
    for (j = 0; j + 4 <= n; j += 4) {
      uint64_t four;
      std::memcpy(&four, row + j, sizeof(four));
      ++at[four & 0xffff];
      ++at[(four >> 16) & 0xffff];
      ++at[(four >> 32) & 0xffff];
      ++at[four >> 48];
    }
    for (; j < n; ++j) ++at[row[j].bits];
  }

  // The steps of bits from first to last, or UPWARDS against it; clears the counters. A vector of counters that are
  // not all 0 is gone through without a branch: which of them are is what no processor can predict.
  template <bool UPWARDS, class C>
  void collect(Steps<C>& steps, int32_t first, int32_t last) {
    constexpr int32_t lanes = kLanes<float>;
    int32_t* const at = counts.data();
    int32_t *const keys = steps.keys.data(), *const ends = steps.ends.data();
    int64_t k = steps.count;
    int32_t total = k == 0 ? 0 : ends[k - 1];
    for (int32_t i = 0; i <= (last - first) / lanes; ++i) {
      const int32_t base = UPWARDS ? first + i * lanes : (last / lanes - i) * lanes;
      if (!any(load<VecI>(at + base))) continue;
#pragma GCC unroll 16
      for (int32_t lane = 0; lane < lanes; ++lane) {
        const int32_t bits = base + (UPWARDS ? lane : lanes - 1 - lane), here = at[bits];
        total += here;
        keys[k] = bits;
        ends[k] = total;
        k += here != 0;
      }
      store(at + base, VecI{});
    }
    steps.count = k;
  }

  template <class C>
  void find(const X* row, int64_t n, double scale, Steps<C>& steps) {
    int32_t positive, negative;
    count(row, n, positive, negative);
    steps.reserve(std::min<int64_t>(n, 65536));
    steps.count = 0;
    // -0 is the 0 that it equals.
    counts[0] += counts[kSign];
    positive = std::max(positive, counts[0] > 0 ? 0 : -1);
    counts[kSign] = 0;
    if (positive >= 0) collect<false>(steps, 0, positive);
    if (negative > kSign) collect<true>(steps, kSign, negative);
    const int32_t* const keys = steps.keys.data();
    C* const logits = steps.probs.data();
    for (int64_t k = 0; k < steps.count; ++k) logits[k] = C(to_compute(X{uint16_t(keys[k])}));
    steps.normalize(scale);
  }
};

// Bins of 1/256 in logit / T, below the largest of a row. Two columns of a bin differ by less than 0.4 %, and their
// mean is known to 1e-6, so that a sum of whole bins is as good as one of all columns. All that is in the last bin or
// beyond, e^-32 of the largest, counts as 0.
constexpr int32_t kBinBits = 13, kPlaceBits = 18, kBins = 1 << kBinBits;
constexpr float kBinsPerUnit = 256;
// A counter has the number of columns above kSumBits, and the sum of their places in the bin below.
constexpr int kSumBits = 40;
constexpr int64_t kMostBinned = int64_t(1) << (kSumBits - kPlaceBits);

struct Bins {
  std::vector<uint64_t> counts = std::vector<uint64_t>(size_t(kBins));
  std::vector<uint32_t> places = std::vector<uint32_t>(size_t(kTileElements + kLanes<float>));

  static Bins& mine() {
    static thread_local Bins bins;
    return bins;
  }

  // A vector of logits by where they are in units of 2^-kPlaceBits of a bin below the largest; NaN is far below.
  struct Ruler {
    float top, units;
    Ruler(double largest, double scale)
        : top(float(largest)), units(float(scale * kLn2 * kBinsPerUnit * (1 << kPlaceBits))) {}
    KDK_INLINE VecU operator()(VecF x) const {
      const VecF most = VecF{} + float(uint32_t(kBins - 1) << kPlaceBits);
      return bit_cast<VecU>(__builtin_convertvector(min_of((top - x) * units, most), VecI));
    }
  };

  // Calls visit(begin, end) once the places of logits [begin, end) are in `places`.
  template <class Visit>
  KDK_INLINE void tiles(const float* row, int64_t n, const Ruler& ruler, Visit visit) {
    for (int64_t begin = 0; begin < n; begin += kTileElements) {
      const int64_t end = std::min(n, begin + kTileElements);
      int64_t j = begin;
      for (; j + kLanes<float> <= end; j += kLanes<float>)
        store(places.data() + (j - begin), ruler(load<VecF>(row + j)));
      if (j < end) {
        float last[kLanes<float>] = {};
        std::copy(row + j, row + end, last);
        store(places.data() + (j - begin), ruler(load<VecF>(last)));
      }
      visit(begin, end);
    }
  }

  void find(const float* row, int64_t n, double scale, Steps<float>& steps) {
    steps.count = 0;
    steps.log2_z = std::numeric_limits<double>::quiet_NaN();
    const double top = maximum(row, n);
    VecI bad = {};
    int64_t j = 0;
    for (; j + kLanes<float> <= n; j += kLanes<float>) {
      const VecF x = load<VecF>(row + j);
      bad |= x != x;
    }
    bool nan = any(bad);
    for (; j < n; ++j) nan |= row[j] != row[j];
    if (nan || !std::isfinite(top)) return;
    uint64_t* const at = counts.data();
    tiles(row, n, Ruler(top, scale), [&](int64_t begin, int64_t end) KDK_LAMBDA_INLINE {
      for (int64_t k = 0; k < end - begin; ++k) {
        const uint32_t place = places[size_t(k)];
        at[place >> kPlaceBits] += (uint64_t(1) << kSumBits) + (place & ((1u << kPlaceBits) - 1));
      }
    });
    steps.reserve(kBins);
    int32_t *const keys = steps.keys.data(), *const ends = steps.ends.data();
    float* const probs = steps.probs.data();
    constexpr uint64_t below = (uint64_t(1) << kSumBits) - 1;
    int32_t total = 0;
    int64_t count = 0;
    for (int32_t bin = 0; bin < kBins; ++bin) {
      const uint64_t counter = at[bin];
      total += int32_t(counter >> kSumBits);
      keys[count] = bin;
      ends[count] = total;
      probs[count] = float(int64_t(counter & below));
      count += counter != 0;
    }
    std::fill(counts.begin(), counts.end(), 0);
    steps.count = count;
    // From the sums of places to the mean of each step, below the largest logit.
    constexpr float unit = 1.0f / (1 << kPlaceBits);
    const int32_t last = keys[count - 1];
    for (int64_t k = count - 1; k > 0; --k) probs[k] = -float(keys[k]) - probs[k] * unit / float(ends[k] - ends[k - 1]);
    probs[0] = -float(keys[0]) - probs[0] * unit / float(ends[0]);
    if (last == kBins - 1) probs[count - 1] = -std::numeric_limits<float>::infinity();
    // Powers of two of the places themselves.
    steps.affine = kdk::affine<float>(kLog2e / double(kBinsPerUnit), 0);
    steps.exponentials();
    // Of the row's logits from here on.
    const double log2_z = steps.log2_z;
    steps.top = top;
    steps.affine = kdk::affine<float>(scale, top);
    steps.log2_z = log2_z + steps.affine.scalar(top);
  }
};

// A sorted row.
template <class X>
struct Sorted {
  using Bits = std::conditional_t<sizeof(X) == 8, uint64_t, uint32_t>;
  struct Entry {
    Bits bits;  // less for larger logits
    int32_t column;
  };
  std::vector<Entry> entries, others;

  static Sorted& mine() {
    static thread_local Sorted sorted;
    return sorted;
  }
  static KDK_INLINE Bits bits_of(X x) {
    constexpr Bits sign = Bits(1) << (8 * sizeof(X) - 1);
    const Bits bits = bit_cast<Bits>(X(x + X(0)));  // -0 becomes 0
    return bits & sign ? bits : ~(bits | sign);
  }
  static KDK_INLINE X logit_of(Bits bits) {
    constexpr Bits sign = Bits(1) << (8 * sizeof(X) - 1);
    return bit_cast<X>(bits & sign ? bits : Bits(~bits & ~sign));
  }

  // Stable, eleven bits at a time from the lowest.
  void sort() {
    constexpr int digit = 11, buckets = 1 << digit;
    others.resize(entries.size());
    for (int shift = 0; shift < int(8 * sizeof(Bits)); shift += digit) {
      uint32_t starts[buckets] = {};
      for (const Entry& entry : entries) ++starts[(entry.bits >> shift) & (buckets - 1)];
      uint32_t sum = 0;
      for (uint32_t& start : starts) {
        const uint32_t here = start;
        start = sum;
        sum += here;
      }
      for (const Entry& entry : entries) others[starts[(entry.bits >> shift) & (buckets - 1)]++] = entry;
      entries.swap(others);
    }
  }

  template <class C>
  void find(const X* row, int64_t n, double scale, Steps<C>& steps) {
    entries.resize(size_t(n));
    for (int64_t j = 0; j < n; ++j) entries[size_t(j)] = {bits_of(row[j]), int32_t(j)};
    sort();
    steps.reserve(n);
    steps.order.resize(size_t(n));
    steps.count = 0;
    for (int64_t j = 0; j < n; ++j) {
      const Entry& entry = entries[size_t(j)];
      steps.order[size_t(j)] = entry.column;
      if (j == 0 || entry.bits != entries[size_t(j - 1)].bits)
        steps.probs[size_t(steps.count++)] = C(logit_of(entry.bits));
      steps.ends[size_t(steps.count - 1)] = int32_t(j + 1);
    }
    steps.normalize(scale);
  }
};

enum class Found { kByBits, kByBins, kSorted };
template <class X, class C>
Found how_to_find(int64_t n, bool exact) {
  if (sizeof(X) == 2) return Found::kByBits;
  return sizeof(X) == 8 || sizeof(C) == 8 || exact || n >= kMostBinned ? Found::kSorted : Found::kByBins;
}

// The steps of a row of n logits at log2(e) / T.
template <class X, class C>
Found find_steps(const X* row, int64_t n, double scale, bool exact, Steps<C>& steps) {
  const Found how = how_to_find<X, C>(n, exact);
  if constexpr (sizeof(X) == 2) {
    Counters<X>::mine().find(row, n, scale, steps);
  } else if constexpr (std::is_same_v<X, float> && std::is_same_v<C, float>) {
    how == Found::kByBins ? Bins::mine().find(row, n, scale, steps) : Sorted<X>::mine().find(row, n, scale, steps);
  } else {
    Sorted<X>::mine().find(row, n, scale, steps);
  }
  return how;
}

}  // namespace KDK_ISA
}  // namespace kdk
