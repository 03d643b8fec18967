// SIMD vectors of one width, chosen by the flags of the including file: AVX-512, AVX2, or 16 bytes anywhere else.
//
// Everything lives in an inline namespace named after the instruction set: copies compiled with different flags never
// meet in the linker. GCC and Clang vector extensions carry the arithmetic; intrinsics only where the compilers do not
// find the instruction.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

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
// Whether a bit of a vector of integers is set.
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

// Bounds of x in which exp2_fast works: 2^-127 counts as 0, 2^128 as inf. NaN passes.
KDK_INLINE VecF clamp_exponent(VecF x) { return min_of(VecF{} + 128.0f, max_keep_nan(VecF{} - 127.0f, x)); }
KDK_INLINE VecD clamp_exponent(VecD x) {
  // Doubles go to the library's exp2, which needs no bounds; a finite one keeps 0 * x at 0.
  return max_keep_nan(VecD{} - 2000.0, x);
}

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

// The polynomial of 2^f = 1 + f Q(f) for f in [-1/2, 1/2] / 2^STEPS_LOG2, minimax in the relative error of 2^f, whose
// mean is 0. A mean other than 0 comes back as it is in the divergences that set p against log p: JSD was off by 3e-7
// with the best 2^f for the maximum alone. f comes divided by 2^UNIT_LOG2, and so Q multiplied by it.
template <int DEGREE, int STEPS_LOG2>
struct Exp2Slope;
template <>
struct Exp2Slope<5, 0> {  // 1.2e-7
  static constexpr float at[] = {0.6931466460227966f, 0.2402230054140091f, 0.05551067739725113f, 0.00966887641698122f,
                                 0.0013179666129872203f};
};
template <>
struct Exp2Slope<4, 0> {  // 3.0e-6
  static constexpr float at[] = {0.6931210160255432f, 0.24022895097732544f, 0.05591738969087601f, 0.00962985958904028f};
};
template <>
struct Exp2Slope<3, 3> {  // 6e-8
  static constexpr float at[] = {0.6931472420692444f, 0.24024905264377594f, 0.0554962232708931f};
};
template <>
struct Exp2Slope<2, 3> {  // 3.6e-6
  static constexpr float at[] = {0.6933088898658752f, 0.2402709424495697f};
};
template <>
struct Exp2Slope<3, 4> {  // 4e-9
  static constexpr float at[] = {0.6931471824645996f, 0.24023213982582092f, 0.055502135306596756f};
};
template <>
struct Exp2Slope<2, 4> {  // 4.4e-7
  static constexpr float at[] = {0.6931877136230469f, 0.24023769795894623f};
};

constexpr float power_of_two(int n) { return n == 0 ? 1.0f : 2.0f * power_of_two(n - 1); }

template <int DEGREE, int STEPS_LOG2, int UNIT_LOG2, size_t... K, int COUNT>
KDK_INLINE void exp2_slopes(std::index_sequence<K...>, const VecF (&f)[COUNT], VecF (&slope)[COUNT]) {
  const VecF zero = {};
  static const VecF c[] = {zero + Exp2Slope<DEGREE, STEPS_LOG2>::at[K] * power_of_two(UNIT_LOG2 * int(K + 1))...};
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) slope[i] = c[DEGREE - 1];
#pragma GCC unroll 4
  for (int k = DEGREE - 2; k >= 0; --k)
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) slope[i] = plus_in_memory(slope[i], f[i], c[k]);
}
template <int DEGREE, int STEPS_LOG2, int UNIT_LOG2, int COUNT>
KDK_INLINE void exp2_slopes(const VecF (&f)[COUNT], VecF (&slope)[COUNT]) {
  exp2_slopes<DEGREE, STEPS_LOG2, UNIT_LOG2>(std::make_index_sequence<DEGREE>(), f, slope);
}

// 1.5 * 2^23, to which adding rounds to an integer, and the exponent's bias.
constexpr float kRoundingBias = 12582912.0f + 127.0f;

// 2^x for x in [-127, 128]; exactly 0 at -127, so also for a clamped -inf. NaN stays NaN because the exponent is
// applied by a multiplication.
template <int DEGREE>
KDK_INLINE VecF exp2_fast(VecF x) {
  const VecF shifted = x + kRoundingBias;
  const VecF f[] = {x - (shifted - kRoundingBias)};
  VecF slope[1];
  exp2_slopes<DEGREE, 0, 0>(f, slope);
  return (slope[0] * f[0] + 1.0f) * bit_cast<VecF>(bit_cast<VecI>(shifted) << 23);
}
template <int DEGREE>
KDK_INLINE VecD exp2_fast(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp2(x[i]);
  return y;
}

// Natural exponential for the functors; inf from 2^128 on.
KDK_INLINE VecF kdk_exp(VecF x) { return exp2_fast<5>(clamp_exponent(x * 1.4426950408889634f)); }
// 2^x to 3e-6.
KDK_INLINE VecF kdk_exp2_coarse(VecF x) { return exp2_fast<4>(clamp_exponent(x)); }
KDK_INLINE VecD kdk_exp(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
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

// Two values that go through the same instructions side by side, and pairs of pairs. A functor's chain of dependent
// instructions outlasts the window in which the processor looks for independent ones; written four abreast they stand
// next to each other.
template <class T>
struct Pair {
  T a, b;
  Pair() = default;
  KDK_INLINE Pair(T x, T y) : a(x), b(y) {}
};
#define KDK_PAIR_OPERATOR(op)                                       \
  template <class T>                                                \
  KDK_INLINE auto operator op(const Pair<T>& x, const Pair<T>& y) { \
    return Pair<decltype(x.a op y.a)>(x.a op y.a, x.b op y.b);      \
  }                                                                 \
  template <class T>                                                \
  KDK_INLINE Pair<T> operator op(const Pair<T>& x, float y) {       \
    return Pair<T>(x.a op y, x.b op y);                             \
  }                                                                 \
  template <class T>                                                \
  KDK_INLINE Pair<T> operator op(float x, const Pair<T>& y) {       \
    return Pair<T>(x op y.a, x op y.b);                             \
  }
KDK_PAIR_OPERATOR(+)
KDK_PAIR_OPERATOR(-)
KDK_PAIR_OPERATOR(*)
KDK_PAIR_OPERATOR(/)
KDK_PAIR_OPERATOR(>)
KDK_PAIR_OPERATOR(<)
KDK_PAIR_OPERATOR(==)
KDK_PAIR_OPERATOR(&)
KDK_PAIR_OPERATOR(|)
#undef KDK_PAIR_OPERATOR
template <class T>
KDK_INLINE Pair<T> operator-(const Pair<T>& x) {
  return Pair<T>(-x.a, -x.b);
}
template <class M, class T>
KDK_INLINE Pair<T> kdk_where(const Pair<M>& mask, const Pair<T>& x, const Pair<T>& y) {
  return Pair<T>(kdk_where(mask.a, x.a, y.a), kdk_where(mask.b, x.b, y.b));
}
template <class T>
KDK_INLINE Pair<T> unfused(const Pair<T>& x) {
  return Pair<T>(unfused(x.a), unfused(x.b));
}
template <class T>
KDK_INLINE T horizontal(const Pair<T>& x) {
  return x.a + x.b;
}

// The steps of a logarithm that arithmetic cannot say: the exponent in units of 2^-23, and the mantissa in [sqrt(1/2),
// sqrt(2)).
constexpr int32_t kLowestMantissa = 0x3f3504f3;
KDK_INLINE VecI exponent_of(VecF x) { return (bit_cast<VecI>(x) - kLowestMantissa) & int32_t(0xff800000); }
KDK_INLINE VecF mantissa_of(VecF x, VecI exponent) { return bit_cast<VecF>(bit_cast<VecI>(x) - exponent); }
KDK_INLINE VecF to_float(VecI x) { return __builtin_convertvector(x, VecF); }
template <class T>
KDK_INLINE auto exponent_of(const Pair<T>& x) {
  return Pair<decltype(exponent_of(x.a))>(exponent_of(x.a), exponent_of(x.b));
}
template <class T, class E>
KDK_INLINE Pair<T> mantissa_of(const Pair<T>& x, const Pair<E>& exponent) {
  return Pair<T>(mantissa_of(x.a, exponent.a), mantissa_of(x.b, exponent.b));
}
template <class E>
KDK_INLINE auto to_float(const Pair<E>& x) {
  return Pair<decltype(to_float(x.a))>(to_float(x.a), to_float(x.b));
}
// Natural logarithm of a finite number >= 0: log(2^e (1 + f)) = e log 2 + f - f^2 / 2 + f^3 P(f), minimax in absolute
// error, 1.4e-8. The first two terms are exact: divergences of near models are made of the second alone. Numbers below
// the normal range, 0 included, give about -88: what multiplies them is 0.
template <class V>
KDK_INLINE V log_of_floats(V x) {
  const auto exponent = exponent_of(x);
  const V f = mantissa_of(x, exponent) - 1.0f;
  V poly = 0.08792100101709366f * f + -0.14368557929992676f;
  poly = poly * f + 0.14929217100143433f;
  poly = poly * f + -0.16564446687698364f;
  poly = poly * f + 0.19960030913352966f;
  poly = poly * f + -0.2500174939632416f;
  poly = poly * f + 0.3333401083946228f;
  return to_float(exponent) * (0.6931471805599453f / (1 << 23)) + (f * f * (poly * f - 0.5f) + f);
}
#if defined(__AVX512F__)
// With the mantissas in 16 bins, which a permutation looks up: log m = log c + log1p(r), r = m / c - 1 in [-0.03,
// 0.04], and c = 1 where m is next to 1. Two multiplications less than one polynomial for all; 1e-9 before rounding.
alignas(64) constexpr float kBinInverse[] = {
    1.3836392164230347f, 1.3262920379638672f, 1.2735093832015991f, 1.2247670888900757f, 1.17961847782135f,
    1.1376800537109375f, 1.0986213684082031f, 1.0621554851531982f, 1.028032660484314f,  1.0f,
    0.9341747760772705f, 0.8826409578323364f, 0.8364956378936768f, 0.7949356436729431f, 0.7573098540306091f,
    0.7230848670005798f};
alignas(64) constexpr float kBinLog[] = {
    -0.32471713423728943f, -0.2823871076107025f,  -0.24177637696266174f, -0.20275069773197174f, -0.16519106924533844f,
    -0.12899114191532135f, -0.09405609220266342f, -0.0603003203868866f,  -0.02764693833887577f, 0.0f,
    0.0680917352437973f,   0.12483678013086319f,  0.17853397130966187f,  0.2294941246509552f,   0.27798280119895935f,
    0.3242286741733551f};
KDK_INLINE VecF of_bin(const float* values, VecI places) {
  return _mm512_permutexvar_ps(bit_cast<__m512i>(places), load<VecF>(values));
}
KDK_INLINE VecF kdk_log(VecF x) {
  const VecI exponent = exponent_of(x), places = (bit_cast<VecI>(x) - kLowestMantissa) >> 19;
  const VecF r = mantissa_of(x, exponent) * of_bin(kBinInverse, places) - 1.0f;
  const VecF poly = (-0.24753102660179138f * r + 0.3335205018520355f) * r - 0.5f;
  return to_float(exponent) * (0.6931471805599453f / (1 << 23)) + (r * r * poly + r + of_bin(kBinLog, places));
}
#else
KDK_INLINE VecF kdk_log(VecF x) { return log_of_floats(x); }
KDK_INLINE Pair<Pair<VecF>> kdk_log(const Pair<Pair<VecF>>& x) { return log_of_floats(x); }
#endif
// 1 / x to a rounding, of positive numbers in the normal range: an estimate to 2^-14, and a step of Newton. From the
// estimate of AVX2, to 2^-12, a step would leave 5e-8 of one sign, which JSD shows.
KDK_INLINE VecF kdk_inverse(VecF x) {
#if defined(__AVX512F__)
  const VecF y = _mm512_rcp14_ps(x);
  return y + y * (1.0f - x * y);
#else
  return 1.0f / x;
#endif
}
KDK_INLINE VecD kdk_inverse(VecD x) { return 1.0 / x; }
// The logarithm of a ratio u of probabilities; of 0 a number. In double it is taken from
// u - 1 where that is small: rows come there because u is next to 1.
template <class V>
KDK_INLINE V kdk_log_ratio(const V& u, const V&) {
  return kdk_log(u);
}
KDK_INLINE VecD kdk_log_ratio(const VecD& u, const VecD& less_one) {
  constexpr double smallest = std::numeric_limits<double>::min();
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i)
    y[i] = std::abs(less_one[i]) < 0.5 ? std::log1p(less_one[i]) : std::log(std::max(u[i], smallest));
  return y;
}
KDK_INLINE VecD kdk_log(VecD x) {
  VecD y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::log(x[i]);
  return y;
}
template <class T>
KDK_INLINE Pair<T> kdk_log(const Pair<T>& x) {
  return Pair<T>(kdk_log(x.a), kdk_log(x.b));
}
template <class T>
KDK_INLINE Pair<T> kdk_inverse(const Pair<T>& x) {
  return Pair<T>(kdk_inverse(x.a), kdk_inverse(x.b));
}
template <class T>
KDK_INLINE Pair<T> kdk_log_ratio(const Pair<T>& u, const Pair<T>& less_one) {
  return Pair<T>(kdk_log_ratio(u.a, less_one.a), kdk_log_ratio(u.b, less_one.b));
}
#if !defined(__AVX512F__)
KDK_INLINE Pair<Pair<VecF>> kdk_log_ratio(const Pair<Pair<VecF>>& u, const Pair<Pair<VecF>>&) {
  return log_of_floats(u);
}
#endif
template <class T>
KDK_INLINE Pair<T> kdk_exp(const Pair<T>& x) {
  return Pair<T>(kdk_exp(x.a), kdk_exp(x.b));
}
template <class T>
KDK_INLINE Pair<T> kdk_exp2_coarse(const Pair<T>& x) {
  return Pair<T>(kdk_exp2_coarse(x.a), kdk_exp2_coarse(x.b));
}

// (x - m) * c - r: x * c relative to a reference m c + r, of which one part is 0. Where the machine has fused
// multiply-adds the reference is an integer r and m is 0. Without them, of numbers that no float tells from the next
// integer, and in double, the reference is the raw m: x - m then has one rounding, relative to itself.
KDK_INLINE VecF relative(VecF x, float c, float r, float m) { return (x - m) * c - r; }
KDK_INLINE VecD relative(VecD x, double c, double, double m) { return (x - m) * c; }

// bf16 and fp16 as bits.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

KDK_INLINE float to_compute(float x) { return x; }
KDK_INLINE double to_compute(double x) { return x; }
KDK_INLINE float to_compute(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
KDK_INLINE float to_compute(Half h) {
  // Exponent and mantissa move to their places in fp32; 2^112 rebiases, also for denormals.
  const uint32_t magnitude = uint32_t(h.bits & 0x7fff) << 13;
  float x = bit_cast<float>(magnitude) * 5.192296858534828e+33f;
  if (magnitude >= (0x7c00u << 13)) x = bit_cast<float>(magnitude | 0x7f800000u);
  return h.bits & 0x8000 ? -x : x;
}
KDK_INLINE uint16_t half_bits(float x) {
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
KDK_INLINE void from_compute(float x, float* out) { *out = x; }
KDK_INLINE void from_compute(double x, double* out) { *out = x; }
KDK_INLINE void from_compute(float x, BFloat16* out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  out->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
KDK_INLINE void from_compute(float x, Half* out) { out->bits = half_bits(x); }

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
  KDK_INLINE void see(VecS pairs) {
#if defined(__AVX512BW__)
    high = bit_cast<VecS>(_mm512_max_epi16(bit_cast<__m512i>(high), bit_cast<__m512i>(pairs)));
#elif defined(__AVX2__)
    high = bit_cast<VecS>(_mm256_max_epi16(bit_cast<__m256i>(high), bit_cast<__m256i>(pairs)));
#else
    high = high > pairs ? high : pairs;
#endif
  }
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

// 2^(i / N) for i < N, N the lanes of a vector: where a permutation picks one for each lane, the polynomial loses two
// degrees, of which each is a fused multiply-add. As bits less those of 1 and of i / N added to the exponent.
#if defined(__AVX512F__)
constexpr int kStepsLog2 = 4;
alignas(64) constexpr int32_t kSteps[] = {0,       -152893, -289342, -408621, -509968, -592590, -655657, -698305,
                                          -719629, -718684, -694486, -646004, -572163, -471841, -343865, -187011};
#elif defined(__AVX2__)
constexpr int kStepsLog2 = 3;
alignas(32) constexpr int32_t kSteps[] = {0, -289342, -509968, -655657, -719629, -694486, -572163, -343865};
#else
constexpr int kStepsLog2 = 0;
alignas(16) constexpr int32_t kSteps[kLanes<float>] = {};
#endif
// The steps of which the low bits of places are the index.
KDK_INLINE VecI steps_at(VecI places) {
  const VecI steps = load<VecI>(kSteps);
#if defined(__AVX512F__)
  return bit_cast<VecI>(_mm512_permutexvar_epi32(bit_cast<__m512i>(places), bit_cast<__m512i>(steps)));
#elif defined(__AVX2__)
  return bit_cast<VecI>(_mm256_permutevar8x32_epi32(bit_cast<__m256i>(steps), bit_cast<__m256i>(places)));
#else
  (void)places;
  return steps;
#endif
}

// Exponentials straight from logits, with no x = logit c - r between: three instructions reduce a logit where x and its
// reduction take four, and one watches the bounds where clamping takes two. Needs fused multiply-adds and an integer r.
//
// With N steps of an octave, adding bias = 2 + (127 - r) N 2^-22 to logit c N 2^-22 rounds x N to an integer n, for the
// spacing of floats in [2, 4) is 2^-22, and leaves 127 N + n in the low bits. As long as it is in [0, 256 N) the other
// bits are those of 2; of the numbers that have no others set only 0 is not among these, and there the exponential
// comes out as 0, as it should. Exponentials below 2^-126 are anything below it, those from 2^127.5 on inf or NaN.
#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
constexpr int kUnitLog2 = 22 - kStepsLog2;
constexpr float kUnit = 1.0f / float(1 << kUnitLog2);

struct Bounds {
  VecI seen = {};
  // Whether every x was in [-127, 128]; NaN is not.
  bool kept() const { return !any(seen & ~(((256 << kStepsLog2) - 1) | bit_cast<int32_t>(2.0f))); }
};
// Of several vectors step by step (see Pair): two make the sparse sweep 2 to 3 % faster, four run out of AVX2's
// registers, and gain nothing with AVX-512. ACCURACY is the degree of the polynomial with no steps.
template <int ACCURACY, int COUNT>
KDK_INLINE void exp2_of_logits(VecF (&v)[COUNT], float scale, float bias, Bounds& bounds) {
  VecF power[COUNT], f[COUNT], slope[COUNT];
  constexpr int degree = kStepsLog2 > 0 ? ACCURACY - 2 : ACCURACY;
#define KDK_EACH _Pragma("GCC unroll 4") for (int i = 0; i < COUNT; ++i)
  KDK_EACH power[i] = v[i] * scale + bias;
  KDK_EACH bounds.seen |= bit_cast<VecI>(power[i]);
  KDK_EACH f[i] = v[i] * scale + (bias - power[i]);
  KDK_EACH {
    const VecI places = bit_cast<VecI>(power[i]);
    power[i] = bit_cast<VecF>((places << (23 - kStepsLog2)) + steps_at(places));
  }
  exp2_slopes<degree, kStepsLog2, kUnitLog2>(f, slope);
  // 2^n + (2^n f) Q: the product by 2^n is done while Q is worked out. It costs no instruction more and three cycles
  // less on the way from a logit to its exponential, which is what the loop waits for.
  KDK_EACH f[i] *= power[i];
  KDK_EACH v[i] = slope[i] * f[i] + power[i];
#undef KDK_EACH
}
template <int ACCURACY>
KDK_INLINE VecF exp2_of_logit(VecF logit, float scale, float bias, Bounds& bounds) {
  VecF v[] = {logit};
  exp2_of_logits<ACCURACY>(v, scale, bias, bounds);
  return v[0];
}

template <>
struct Io<BFloat16> {
  using C = float;
  static constexpr bool kCoarse = true;
  static constexpr int kBlock = 2 * kLanes<float>;
  // One vector, in the order of the elements.
  KDK_INLINE static VecF widen(const BFloat16* address) {
#if defined(__AVX512F__)
    return bit_cast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(address)), 16));
#elif defined(__AVX2__)
    return bit_cast<VecF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(address)), 16));
#else
    VecF v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(address[i]);
    return v;
#endif
  }
  // Back, rounded as from_compute does.
  KDK_INLINE static void narrow(BFloat16* address, VecF v) {
    const VecU bits = bit_cast<VecU>(v), nan = VecU{} + 0x7fc0u;
    const VecU halves = v == v ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : nan;
#if defined(__AVX512F__)
    store(address, _mm512_cvtepi32_epi16(bit_cast<__m512i>(halves)));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(halves), bit_cast<__m256i>(halves));
    store(address, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
    for (int i = 0; i < kLanes<float>; ++i) address[i].bits = uint16_t(halves[i]);
#endif
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
    const VecU low = rounded(a) >> 16, high = rounded(b);
#if defined(__AVX2__) && !defined(__AVX512F__)
    const VecU pairs = bit_cast<VecU>(_mm256_blend_epi16(bit_cast<__m256i>(low), bit_cast<__m256i>(high), 0xaa));
#else
    const VecU pairs = low | (high & 0xffff0000u);
#endif
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
  KDK_INLINE static VecF widen(const Half* address) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(load<__m256i>(address));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(load<__m128i>(address));
#else
    VecF v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(address[i]);
    return v;
#endif
  }
  KDK_INLINE static void load2(const Half* address, VecF& a, VecF& b) {
    a = widen(address);
    b = widen(address + kLanes<float>);
  }
  KDK_INLINE static void narrow(Half* address, VecF v) {
#if defined(__AVX512F__)
    store(address, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    store(address, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) address[i].bits = half_bits(v[i]);
#endif
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
