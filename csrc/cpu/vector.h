// Vectors of one width, chosen by the flags of the including file: AVX-512, AVX2, or 16 bytes anywhere else. The only
// header that knows an instruction set; to port the kernels is to port this file.
//
// Everything lives in an inline namespace named after the instruction set: copies compiled with different flags never
// meet in the linker. GCC and Clang vector extensions carry the arithmetic; intrinsics only where the compilers do not
// find the instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KDK_ISA avx512
#define KDK_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KDK_ISA avx2
#define KDK_VECTOR_BYTES 32
#else
#define KDK_ISA baseline
#define KDK_VECTOR_BYTES 16
#endif

#define KDK_INLINE inline __attribute__((always_inline))
#define KDK_LAMBDA_INLINE __attribute__((always_inline))

namespace kdk {
inline namespace KDK_ISA {

constexpr int kVectorBytes = KDK_VECTOR_BYTES;

typedef float VecF __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef int32_t VecI __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef double VecD __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef int64_t VecL __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef int16_t VecS __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef uint16_t VecW __attribute__((vector_size(KDK_VECTOR_BYTES)));

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
  using V = VecF;
  using Mask = VecI;
};
template <>
struct VecOf<double> {
  using V = VecD;
  using Mask = VecL;
};
template <class C>
using Vec = typename VecOf<C>::V;
template <class C>
constexpr int kLanes = kVectorBytes / int(sizeof(C));

template <class V>
KDK_INLINE V load(const void* address) {
  V v;
  std::memcpy(&v, address, sizeof(V));
  return v;
}
template <class V>
KDK_INLINE void store(void* address, V v) {
  std::memcpy(address, &v, sizeof(V));
}
template <class To, class From>
KDK_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between different sizes");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// A write that goes around the caches; the address is aligned to the vector.
template <class V>
KDK_INLINE void stream(void* address, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(address), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(address), bit_cast<__m256i>(v));
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(address), bit_cast<__m128i>(v));
#else
  store(address, v);
#endif
}

// The second operand wins where either is NaN, as in the x86 instruction.
KDK_INLINE VecF max_keep_nan(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
KDK_INLINE VecD max_keep_nan(VecD a, VecD b) { return a > b ? a : b; }

KDK_INLINE VecF kdk_where(VecI mask, VecF a, VecF b) { return mask ? a : b; }
KDK_INLINE VecD kdk_where(VecL mask, VecD a, VecD b) { return mask ? a : b; }
KDK_INLINE VecF keep(VecI mask, VecF a) { return bit_cast<VecF>(mask & bit_cast<VecI>(a)); }
KDK_INLINE VecD keep(VecL mask, VecD a) { return bit_cast<VecD>(mask & bit_cast<VecL>(a)); }

KDK_INLINE VecF min_of(VecF a, VecF b) {
#if defined(__AVX512F__)
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
KDK_INLINE VecD min_of(VecD a, VecD b) { return a < b ? a : b; }

// The even elements of the two vectors in a, the odd ones in b, in order.
KDK_INLINE void even_and_odd(VecF& a, VecF& b) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const VecF evens = _mm512_permutex2var_ps(a, even, b);
  b = _mm512_permutex2var_ps(a, odd, b);
  a = evens;
#elif defined(__AVX2__)
  // Of each half of a, then of b: the middle two pairs change places.
  const auto in_order = [](VecF v) KDK_LAMBDA_INLINE {
    return bit_cast<VecF>(_mm256_permute4x64_epi64(bit_cast<__m256i>(v), 0xd8));
  };
  const VecF evens = in_order(_mm256_shuffle_ps(a, b, 0x88));
  b = in_order(_mm256_shuffle_ps(a, b, 0xdd));
  a = evens;
#else
  VecF evens, odds;
  for (int i = 0; i < kLanes<float>; ++i) {
    evens[i] = 2 * i < kLanes<float> ? a[2 * i] : b[2 * i - kLanes<float>];
    odds[i] = 2 * i < kLanes<float> ? a[2 * i + 1] : b[2 * i + 1 - kLanes<float>];
  }
  a = evens, b = odds;
#endif
}

// Lanes are folded in halves: a chain of eight additions would cost as much as a hundred elements, and so does the way
// through memory that the compilers take where they are not told of a shorter one.
template <class C, class Fold>
KDK_INLINE C fold_lanes(Vec<C> v, Fold fold) {
#if defined(__AVX2__)
  if constexpr (std::is_same_v<C, float>) {
#if defined(__AVX512F__)
    const __m256 half = fold(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#else
    const __m256 half = v;
#endif
    const __m128 four = fold(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    const __m128 two = fold(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(fold(two, _mm_movehdup_ps(two)));
  }
#endif
  C lanes[kLanes<C>];
  store(lanes, v);
  for (int half = kLanes<C> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = fold(lanes[i], lanes[i + half]);
  return lanes[0];
}
// True where any bit of a vector of integers is set.
template <class V>
KDK_INLINE bool any(V bits) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bit_cast<__m512i>(bits), bit_cast<__m512i>(bits)) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(bit_cast<__m256i>(bits), bit_cast<__m256i>(bits)) == 0;
#else
  const VecL longs = bit_cast<VecL>(bits);
  int64_t all = 0;
  for (int i = 0; i < kLanes<double>; ++i) all |= longs[i];
  return all != 0;
#endif
}
template <class C>
KDK_INLINE C horizontal_sum(Vec<C> v) {
  return fold_lanes<C>(v, [](auto x, auto y) KDK_LAMBDA_INLINE { return x + y; });
}
template <class C>
KDK_INLINE C horizontal_max(Vec<C> v) {
  return fold_lanes<C>(v, [](auto x, auto y) KDK_LAMBDA_INLINE { return (y > x) | (y != y) ? y : x; });
}

// One bit per lane of a comparison's result.
KDK_INLINE uint32_t lane_bits(VecI mask) {
#if defined(__AVX512F__)
  return uint32_t(_mm512_test_epi32_mask(bit_cast<__m512i>(mask), bit_cast<__m512i>(mask)));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(bit_cast<__m256>(mask)));
#elif defined(__x86_64__)
  return uint32_t(_mm_movemask_ps(bit_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<float>; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
#endif
}
KDK_INLINE uint32_t lane_bits(VecL mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<double>; ++i) bits |= uint32_t(mask[i] & 1) << i;
  return bits;
}

// The machine has fused multiply-adds, and the compiler uses them.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

// a * b + c where the multiplication itself reads c from memory. A constant in a register, or loaded into one, is a
// register less for the iterations that the processor runs ahead: 8 % of the sweep.
KDK_INLINE VecF plus_in_memory(VecF a, VecF b, const VecF& c) {
#if defined(__x86_64__) && defined(__FMA__)
  asm("vfmadd213ps %2, %1, %0" : "+v"(a) : "v"(b), "m"(c));
  return a;
#else
  return a * b + c;
#endif
}

// The rounded value of a product: the compiler may not fuse it into the sum that follows. Where student and teacher
// agree, two such products cancel exactly.
template <class V>
KDK_INLINE V unfused(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// One permutation picks a table's entry for each lane, by the low kPickedLog2 bits of places.
#if defined(__AVX512F__)
constexpr int kPickedLog2 = 4;
KDK_INLINE VecI pick(VecI table, VecI places) {
  return bit_cast<VecI>(_mm512_permutexvar_epi32(bit_cast<__m512i>(places), bit_cast<__m512i>(table)));
}
KDK_INLINE VecF pick(VecF table, VecI places) { return _mm512_permutexvar_ps(bit_cast<__m512i>(places), table); }
#elif defined(__AVX2__)
constexpr int kPickedLog2 = 3;
KDK_INLINE VecI pick(VecI table, VecI places) {
  return bit_cast<VecI>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(table), bit_cast<__m256i>(places)));
}
KDK_INLINE VecF pick(VecF table, VecI places) { return _mm256_permutevar8x32_ps(table, bit_cast<__m256i>(places)); }
#else
constexpr int kPickedLog2 = 0;
KDK_INLINE VecI pick(VecI table, VecI) { return table; }
KDK_INLINE VecF pick(VecF table, VecI) { return table; }
#endif

// 1 / x of positive numbers in the normal range, to 2^-14 where it is an estimate. AVX2 has one to 2^-12, from which a
// step of Newton would leave 5e-8 of one sign: JSD shows it.
#if defined(__AVX512F__)
constexpr bool kEstimatesInverse = true;
KDK_INLINE VecF inverse_or_estimate(VecF x) { return _mm512_rcp14_ps(x); }
#else
constexpr bool kEstimatesInverse = false;
KDK_INLINE VecF inverse_or_estimate(VecF x) { return 1.0f / x; }
#endif

KDK_INLINE VecS max_of(VecS a, VecS b) {
#if defined(__AVX512BW__)
  return bit_cast<VecS>(_mm512_max_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return bit_cast<VecS>(_mm256_max_epi16(bit_cast<__m256i>(a), bit_cast<__m256i>(b)));
#else
  return a > b ? a : b;
#endif
}

// Half a vector of 16-bit integers as integers of 32 bits, and back: the low 16 bits of each.
KDK_INLINE VecU widen_halves(const void* address) {
#if defined(__AVX512F__)
  return bit_cast<VecU>(_mm512_cvtepu16_epi32(load<__m256i>(address)));
#elif defined(__AVX2__)
  return bit_cast<VecU>(_mm256_cvtepu16_epi32(load<__m128i>(address)));
#else
  uint16_t halves[kLanes<float>];
  std::memcpy(halves, address, sizeof(halves));
  VecU v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = halves[i];
  return v;
#endif
}
KDK_INLINE void narrow_halves(void* address, VecU v) {
#if defined(__AVX512F__)
  store(address, _mm512_cvtepi32_epi16(bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), bit_cast<__m256i>(v));
  store(address, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  uint16_t halves[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) halves[i] = uint16_t(v[i]);
  std::memcpy(address, halves, sizeof(halves));
#endif
}
// The low 16 bits of each lane of low, whose others are 0, below the high 16 bits of high.
KDK_INLINE VecU join_halves(VecU low, VecU high) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return bit_cast<VecU>(_mm256_blend_epi16(bit_cast<__m256i>(low), bit_cast<__m256i>(high), 0xaa));
#else
  return low | (high & 0xffff0000u);
#endif
}

// fp16 as bits, one number after the other.
KDK_INLINE float float_of_half(uint16_t half) {
  // Exponent and mantissa move to their places in fp32; 2^112 rebiases, also for denormals.
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  float x = bit_cast<float>(magnitude) * 5.192296858534828e+33f;
  if (magnitude >= (0x7c00u << 13)) x = bit_cast<float>(magnitude | 0x7f800000u);
  return half & 0x8000 ? -x : x;
}
KDK_INLINE uint16_t half_of_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000u) {
    // Adding 0.5 leaves the rounded denormal in the low bits.
    const float rounded = bit_cast<float>(magnitude) + 0.5f;
    return uint16_t(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}
// And by the vector.
KDK_INLINE VecF load_halves(const void* address) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(load<__m256i>(address));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(load<__m128i>(address));
#else
  uint16_t halves[kLanes<float>];
  std::memcpy(halves, address, sizeof(halves));
  VecF v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float_of_half(halves[i]);
  return v;
#endif
}
KDK_INLINE void store_halves(void* address, VecF v) {
#if defined(__AVX512F__)
  store(address, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  store(address, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  uint16_t halves[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) halves[i] = half_of_float(v[i]);
  std::memcpy(address, halves, sizeof(halves));
#endif
}

// Orders the writes around the caches before what another thread reads.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace KDK_ISA
}  // namespace kdk
