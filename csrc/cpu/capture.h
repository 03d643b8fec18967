// Capturing a teacher for one instruction set: the k largest logits of a row, and the mass of the others, in one read.
//
// A logit below the threshold, a lower bound of the k-th largest, goes into the sum of the mass outside; the others are
// candidates. After each tile that leaves too many of them all but the k largest join the sum, and the threshold rises.
// The sum is relative to the threshold: no term of it exceeds 1, however far above the largest logits are, and nothing
// is ever subtracted. The first threshold is the k-th largest among the maxima of 2k groups of elements at the
// beginning of the row: at least k logits are no smaller.
//
// x as in affine.h.
#pragma once

#include "patterns.h"
#include "widen.h"

#include <functional>
#include <type_traits>

namespace kdk {
inline namespace KDK_ISA {
namespace capture {

// A logit and its id as one integer, larger for the larger logit, and among equals for the lower id.
__extension__ typedef unsigned __int128 Wide;
template <class C>
using Key = std::conditional_t<sizeof(C) == 4, uint64_t, Wide>;
template <class C>
using Bits = std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>;
template <class C>
constexpr Bits<C> kSign = Bits<C>(1) << (8 * sizeof(C) - 1);

template <class C>
KDK_INLINE Key<C> key_of(C logit, int64_t id) {
  const auto bits = bit_cast<Bits<C>>(logit + C(0));  // -0 becomes 0
  const Bits<C> ordered = bits & kSign<C> ? ~bits : bits | kSign<C>;
  return Key<C>(ordered) << 32 | uint32_t(~uint32_t(id));
}
template <class C>
KDK_INLINE C logit_of(Key<C> key) {
  const auto ordered = Bits<C>(key >> 32);
  return bit_cast<C>(ordered & kSign<C> ? ordered & ~kSign<C> : ~ordered);
}
template <class C>
KDK_INLINE int32_t id_of(Key<C> key) {
  return int32_t(~uint32_t(key));
}

// The k largest logits of a row so far, and the mass of those that are not among them; kept by a thread between rows.
template <class C>
struct Largest {
  int64_t k = 0, count = 0;
  std::vector<Key<C>> keys;  // of the candidates
  std::vector<C> values;     // room to compute in
  C threshold = 0;           // no logit below it is among the k largest
  Affine<C> relative;        // x is 0 at the threshold
  double rest = 0;           // sum of 2^x outside the candidates

  static Largest& mine() {
    static thread_local Largest largest;
    return largest;
  }

  void begin(int64_t size, double scale) {
    k = size;
    count = 0;
    rest = 0;
    keys.resize(size_t(std::max(limit(), k) + kTileElements));
    threshold = std::numeric_limits<C>::lowest();  // -inf is no candidate
    // Nothing but -inf is below this threshold: any finite reference will do.
    relative = affine<C>(scale, 0);
  }
  // Candidates are thinned out when there are more.
  int64_t limit() const { return k + std::max<int64_t>(k, 64); }

  void raise(C logit, C to) {
    const Affine<C> higher = affine<C>(double(relative.c), double(logit));
    // The first reference may be far above; then there is no sum yet.
    if (rest != 0) rest *= std::exp2(relative.reference() - higher.reference());
    relative = higher;
    threshold = to;
  }
  void thin_out() {
    std::nth_element(keys.begin(), keys.begin() + k - 1, keys.begin() + count, std::greater<Key<C>>());
    const C last = logit_of<C>(keys[size_t(k - 1)]);
    // An equal logit further on in the row has the higher id.
    raise(last, std::nextafter(last, std::numeric_limits<C>::infinity()));
    rest += exponentials(relative, k, count);
    count = k;
  }
  // Sum of 2^x of candidates [begin, end), whose logits go to values.
  double exponentials(const Affine<C>& at, int64_t begin, int64_t end) {
    using V = Vec<C>;
    values.resize(size_t(end - begin + kLanes<C>));
    for (int64_t j = begin; j < end; ++j) values[size_t(j - begin)] = logit_of<C>(keys[size_t(j)]);
    std::fill(values.begin() + (end - begin), values.end(), -std::numeric_limits<C>::infinity());
    V sum = {};
    for (int64_t j = 0; j < end - begin; j += kLanes<C>)
      sum += exp2_fast<5>(clamp_exponent(at(load<V>(values.data() + j))));
    return double(horizontal_sum<C>(sum));
  }

  // A lower bound of the k-th largest of n logits, from the first of them; none where they are too few.
  template <class X>
  void seed(const X* s, int64_t n) {
    constexpr int64_t block = Io<X>::kBlock, most = 16;
    const int64_t groups = (2 * k + block - 1) / block * block, members = std::min(most, n / groups);
    if (members < 2) return;
    values.resize(size_t(groups));
    C* peaks = values.data();
    for (int64_t j = 0; j < groups; j += block) {
      Vec<C> high0 = Vec<C>{} - std::numeric_limits<C>::infinity(), high1 = high0;
      for (int64_t i = 0; i < members; ++i) {
        Vec<C> a, b;
        Io<X>::load2(s + i * groups + j, a, b);
        // A NaN is dropped here: the sum will see it.
        high0 = max_keep_nan(a, high0);
        high1 = max_keep_nan(b, high1);
      }
      store(peaks + j, high0);
      store(peaks + j + kLanes<C>, high1);
    }
    std::nth_element(peaks, peaks + k - 1, peaks + groups, std::greater<C>());
    if (peaks[k - 1] > threshold) raise(peaks[k - 1], peaks[k - 1]);
  }

  // The candidates among a block of two vectors.
  template <class X>
  KDK_INLINE void push(Vec<C> a, Vec<C> b, uint32_t hits, int64_t first) {
    C block[Io<X>::kBlock];
    store(block, a);
    store(block + kLanes<C>, b);
    for (; hits != 0; hits &= hits - 1) {
      const int slot = __builtin_ctz(hits);
      keys[size_t(count++)] = key_of<C>(block[slot], first + Io<X>::element(slot));
    }
  }
  template <class X>
  void sweep(const X* s, int64_t n) {
    using V = Vec<C>;
    constexpr int64_t block = Io<X>::kBlock;
    alignas(64) X edge[block];
    for (int64_t begin = 0; begin < n; begin += kTileElements) {
      const int64_t end = std::min(n, begin + kTileElements);
      const Affine<C> at = relative;
      const V least = V{} + threshold, lowest = V{} - C(127);
      V sum0 = {}, sum1 = {};
      for (int64_t j = begin; j < end; j += block) {
        const X* from = s + j;
        prefetch_ahead<block>(from);
        if (end - j < block) {
          from_compute(-std::numeric_limits<C>::infinity(), edge);
          std::fill(edge + 1, edge + block, edge[0]);
          std::copy(s + j, s + end, edge);
          from = edge;
        }
        V a, b;
        Io<X>::load2(from, a, b);
        // Of candidates, which are above the reference, this may be anything.
        V e0 = exp2_fast<kExpDegree<X>>(max_keep_nan(lowest, at(a))),
          e1 = exp2_fast<kExpDegree<X>>(max_keep_nan(lowest, at(b)));
        const auto hit0 = a >= least, hit1 = b >= least;
        const uint32_t hits = lane_bits(hit0) | lane_bits(hit1) << kLanes<C>;
        if (__builtin_expect(hits != 0, 0)) {
          e0 = keep(~hit0, e0);
          e1 = keep(~hit1, e1);
          push<X>(a, b, hits, j);
        }
        sum0 += e0;
        sum1 += e1;
      }
      rest += double(horizontal_sum<C>(sum0 + sum1));
      if (count > limit()) thin_out();
    }
    if (count > k) thin_out();
  }

  // The k largest of n logits in keys, in no order; fewer where fewer are above -inf.
  template <class X>
  void find(const X* s, int64_t n, int64_t size, double scale) {
    begin(size, scale);
    seed(s, n);
    sweep(s, n);
  }

  // Base-2 logarithm of the mass outside in the scaled domain, once the k largest are found.
  template <class X>
  double log2_rest(const X* s, int64_t n) const {
    if (count < k || count == n) return -std::numeric_limits<double>::infinity();
    if (!(rest < 0x1p-90)) return relative.reference() + std::log2(rest);
    // All others are so far below the k-th that they have left the range of their exponentials.
    C* others = Scratch<C>::mine().get(kOtherRow, n);
    widen_row(s, n, others, AsIs());
    for (int64_t j = 0; j < count; ++j) others[id_of<C>(keys[size_t(j)])] = -std::numeric_limits<C>::infinity();
    return log2_sum_exp(others, n, double(relative.c));
  }
};

// One row; writes k ids and log-probabilities, the larger first, and returns the log of the mass outside them.
template <class X, class C = typename Io<X>::C>
C capture_row(const X* s, int64_t n, int64_t k, double scale, int32_t* ids, C* logprobs) {
  Largest<C>& largest = Largest<C>::mine();
  largest.find(s, n, k, scale);
  std::sort(largest.keys.begin(), largest.keys.begin() + largest.count, std::greater<Key<C>>());
  const C infinity = std::numeric_limits<C>::infinity(), nan = std::numeric_limits<C>::quiet_NaN();
  const C top = largest.count == 0 ? nan : logit_of<C>(largest.keys[0]);
  if (std::isnan(largest.rest) || !(top < infinity)) {
    for (int64_t j = 0; j < k; ++j) ids[j] = int32_t(j);
    std::fill(logprobs, logprobs + k, nan);
    return nan;
  }
  const double log2_rest = largest.log2_rest(s, n);
  const Affine<C> at = affine<C>(scale, double(top));
  const double z = largest.exponentials(at, 0, largest.count) + std::exp2(log2_rest - at.reference());
  const double log2_z = std::log2(z);
  for (int64_t j = 0; j < k; ++j) {
    const bool used = j < largest.count;
    ids[j] = used ? id_of<C>(largest.keys[size_t(j)]) : -1;
    logprobs[j] = used ? C(kLn2 * (at.scalar(largest.values[size_t(j)]) - log2_z)) : -infinity;
  }
  return C(std::min(0.0, kLn2 * (log2_rest - at.reference() - log2_z)));
}

}  // namespace capture

template <class X>
void capture_rows(const CaptureArgs& args, int64_t begin, int64_t end) {
  using C = typename Io<X>::C;
  for (int64_t row = begin; row < end; ++row) {
    const double t = per_row(args.temperature_rows, row, args.temperature, sizeof(C) == 8);
    static_cast<C*>(args.tail)[row] =
        capture::capture_row(row_pointer<X>(args.teacher, row, args.length), args.columns, args.k, kLog2e / t,
                             args.ids + row * args.k, static_cast<C*>(args.logprobs) + row * args.k);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
