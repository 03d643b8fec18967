// Logits of every dtype as vectors of the type that their sums have: loading, storing, the largest one met.
#pragma once

#include "math.h"

#include <kdkernels/args.h>

#include <limits>

namespace kdk {
inline namespace KDK_ISA {

// bf16 and fp16 as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Calls f with a number of the type that a dtype names.
template <class F>
KDK_INLINE auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16: return f(BFloat16());
    case DType::kFloat16: return f(Half());
    case DType::kFloat64: return f(double());
    case DType::kFloat32: break;
  }
  return f(float());
}

KDK_INLINE float to_compute(float x) { return x; }
KDK_INLINE double to_compute(double x) { return x; }
KDK_INLINE float to_compute(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
KDK_INLINE float to_compute(Half x) { return float_of_half(x.bits); }
KDK_INLINE void from_compute(float x, float* out) { *out = x; }
KDK_INLINE void from_compute(double x, double* out) { *out = x; }
KDK_INLINE void from_compute(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
KDK_INLINE void from_compute(float x, Half* out) { out->bits = half_of_float(x); }

// 2^x to 3.0e-6 for 16-bit logits, which carry errors of 2^-9 and 2^-11 themselves. Degree 3 (7.5e-5) would be 4 %
// faster, but shows as divergences of -1e-4 where student and teacher are equally sure.
template <class T>
constexpr int kExpDegree = 5;
template <>
constexpr int kExpDegree<BFloat16> = 4;
template <>
constexpr int kExpDegree<Half> = 4;

// The largest logit met, NaN aside. value() is NaN where the kind of logits does not tell: then they must be read
// again. A block is seen where it stands, or by the two vectors that load2 makes of it.
template <class T>
struct Peak {
  using C = T;
  Vec<C> high = Vec<C>{} - std::numeric_limits<C>::infinity();
  KDK_INLINE void see(const T*, Vec<C> a, Vec<C> b) { see(a, b); }
  KDK_INLINE void see(Vec<C> a, Vec<C> b) { high = max_keep_nan(high, max_keep_nan(a, b)); }
  double value() const { return double(horizontal_max<C>(high)); }
};
template <>
struct Peak<Half> {
  VecF high = VecF{} - std::numeric_limits<float>::infinity();
  KDK_INLINE void see(const Half*, VecF a, VecF b) { see(a, b); }
  KDK_INLINE void see(VecF a, VecF b) { high = max_keep_nan(high, max_keep_nan(a, b)); }
  double value() const { return double(horizontal_max<float>(high)); }
};
// As 16-bit integers, positive numbers have their own order; a row that has none is the rare case.
template <>
struct Peak<BFloat16> {
  VecS high = VecS{} - 1;
  KDK_INLINE void see(const BFloat16* address, VecF, VecF) { see(load<VecS>(address)); }
  KDK_INLINE void see(VecF a, VecF b) {
    see(bit_cast<VecS>((bit_cast<VecU>(a) >> 16) | (bit_cast<VecU>(b) & 0xffff0000u)));
  }
  KDK_INLINE void see(VecS pairs) { high = max_of(high, pairs); }
  double value() const {
    constexpr float none = -std::numeric_limits<float>::infinity();
    const VecI pairs = bit_cast<VecI>(high), even = pairs << 16, odd = pairs & int32_t(0xffff0000u);
    const auto positive = [&](VecI bits) { return kdk_where(bits < 0, VecF{} + none, bit_cast<VecF>(bits)); };
    const float best = horizontal_max<float>(max_keep_nan(positive(even), positive(odd)));
    return best == none ? std::numeric_limits<double>::quiet_NaN() : double(best);
  }
};

// Blocks of two vectors. load2 and store2 agree on an order of the elements in the two vectors, which is theirs alone:
// slot(j) is the place of element j in the scratch where the two vectors lie side by side, element(slot) its inverse.
template <class T>
struct Io {  // float, double
  using C = T;
  static constexpr bool kCoarse = false;
  static constexpr int kBlock = 2 * kLanes<C>;
  KDK_INLINE static Vec<C> widen(const T* address) { return load<Vec<C>>(address); }
  KDK_INLINE static void narrow(T* address, Vec<C> v) { store(address, v); }
  KDK_INLINE static void load2(const T* address, Vec<C>& a, Vec<C>& b) {
    a = load<Vec<C>>(address);
    b = load<Vec<C>>(address + kLanes<C>);
  }
  template <bool STREAM>
  KDK_INLINE static void store2(T* address, Vec<C> a, Vec<C> b) {
    if (STREAM) {
      stream(address, a);
      stream(address + kLanes<C>, b);
    } else {
      store(address, a);
      store(address + kLanes<C>, b);
    }
  }
  KDK_INLINE static int64_t slot(int64_t j) { return j; }
  static constexpr int64_t element(int64_t slot) { return slot; }
};

template <>
struct Io<BFloat16> {
  using C = float;
  static constexpr bool kCoarse = true;
  static constexpr int kBlock = 2 * kLanes<float>;
  // One vector, in the order of the elements.
  KDK_INLINE static VecF widen(const BFloat16* address) { return bit_cast<VecF>(widen_halves(address) << 16); }
  // Back, rounded as from_compute does.
  KDK_INLINE static void narrow(BFloat16* address, VecF v) {
    const VecU bits = bit_cast<VecU>(v), nan = VecU{} + 0x7fc0u;
    narrow_halves(address, v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : nan);
  }
  // Even elements in a, odd ones in b: one shift and one mask for a whole register of pairs.
  KDK_INLINE static void load2(const BFloat16* address, VecF& a, VecF& b) {
    const VecU pairs = load<VecU>(address);
    a = bit_cast<VecF>(pairs << 16);
    b = bit_cast<VecF>(pairs & 0xffff0000u);
  }
  // Round to nearest, ties away from zero: exact ties are one result in 65536, and the even rule would cost half of the
  // loop that writes a gradient. NaN stays NaN, for what arithmetic makes has low bits of 0.
  KDK_INLINE static VecU rounded(VecF v) { return bit_cast<VecU>(v) + 0x8000u; }
  template <bool STREAM>
  KDK_INLINE static void store2(BFloat16* address, VecF a, VecF b) {
    const VecU pairs = join_halves(rounded(a) >> 16, rounded(b));
    if (STREAM) {
      stream(address, pairs);
    } else {
      store(address, pairs);
    }
  }
  KDK_INLINE static int64_t slot(int64_t j) {
    const int64_t in_block = j % kBlock;
    return j - in_block + (in_block & 1) * kLanes<float> + in_block / 2;
  }
  static constexpr int64_t element(int64_t slot) {
    return slot < kLanes<float> ? 2 * slot : 2 * (slot - kLanes<float>)+1;
  }
};

template <>
struct Io<Half> {
  using C = float;
  static constexpr bool kCoarse = false;
  static constexpr int kBlock = 2 * kLanes<float>;
  KDK_INLINE static VecF widen(const Half* address) { return load_halves(address); }
  KDK_INLINE static void narrow(Half* address, VecF v) { store_halves(address, v); }
  KDK_INLINE static void load2(const Half* address, VecF& a, VecF& b) {
    a = widen(address);
    b = widen(address + kLanes<float>);
  }
  template <bool STREAM>
  KDK_INLINE static void store2(Half* address, VecF a, VecF b) {
    narrow(address, a);
    narrow(address + kLanes<float>, b);
  }
  KDK_INLINE static int64_t slot(int64_t j) { return j; }
  static constexpr int64_t element(int64_t slot) { return slot; }
};

}  // namespace KDK_ISA
}  // namespace kdk
