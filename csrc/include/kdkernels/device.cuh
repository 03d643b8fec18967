// The parts of all CUDA kernels: numbers, rows as 16-byte vectors, sums over a block and over a cluster of blocks.
// Framework-free.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "args.h"

namespace kdk {
namespace cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;

// 2^x, to 2 ulp; what is below the normal range is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to 2^-22 absolute next to 1, and 1 / x to one ulp, both of a normal number.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class X>
__device__ __forceinline__ X from_float(float x) {
  if constexpr (sizeof(X) == 4) return x;
  if constexpr (sizeof(X) == 2) return X(x);
}

// Element i of a tensor of any floating dtype.
__device__ __forceinline__ double read_number(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<const float*>(data)[i];
    case DType::kBFloat16: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::kFloat16: return to_float(static_cast<const __half*>(data)[i]);
    case DType::kFloat64: break;
  }
  return static_cast<const double*>(data)[i];
}

__device__ __forceinline__ double per_row(const PerRow& values, int64_t row, double otherwise) {
  return values.data == nullptr ? otherwise : double(static_cast<const float*>(values.data)[row * values.stride]);
}

template <class X>
__device__ __forceinline__ X* row_pointer(const LogitsView& view, int64_t row, int64_t length) {
  return static_cast<X*>(view.data) + row / length * view.stride_b + row % length * view.stride_l;
}

// 16 bytes of logits.
template <class X>
constexpr int kLanes = 16 / int(sizeof(X));

// The two halves of a word of 16-bit floats.
template <class X>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (__is_same(X, __nv_bfloat16)) {
    asm("shl.b32 %0, %1, 16;" : "=f"(low) : "r"(word));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(high) : "r"(word));
  } else {
    asm("{ .reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(low), "=f"(high)
        : "r"(word));
  }
}
template <class X>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (__is_same(X, __nv_bfloat16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <class X>
__device__ __forceinline__ void unpack(const uint4& raw, float (&x)[kLanes<X>]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(X) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      unpack<X>(words[i], x[2 * i], x[2 * i + 1]);
    }
  }
}

template <class X>
__device__ __forceinline__ uint4 pack(const float (&x)[kLanes<X>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(X) == 4) {
      words[i] = __float_as_uint(x[i]);
    } else {
      words[i] = pack<X>(x[2 * i], x[2 * i + 1]);
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The larger ones of packed logits; a NaN loses against a number.
template <class X>
__device__ __forceinline__ uint32_t packed_max(uint32_t a, uint32_t b) {
  uint32_t out;
  if constexpr (sizeof(X) == 4) {
    out = __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  } else if constexpr (__is_same(X, __nv_bfloat16)) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
  return out;
}
template <class X>
__device__ __forceinline__ uint4 packed_max(const uint4& a, const uint4& b) {
  return make_uint4(packed_max<X>(a.x, b.x), packed_max<X>(a.y, b.y), packed_max<X>(a.z, b.z), packed_max<X>(a.w, b.w));
}
template <class X>
__device__ __forceinline__ float largest(const uint4& raw) {
  const uint32_t one = packed_max<X>(packed_max<X>(raw.x, raw.y), packed_max<X>(raw.z, raw.w));
  if constexpr (sizeof(X) == 4) return __uint_as_float(one);
  float x[kLanes<X>];
  unpack<X>(make_uint4(one, one, one, one), x);
  return fmaxf(x[0], x[1]);
}
// 16 bytes of -inf.
template <class X>
__device__ __forceinline__ uint4 lowest() {
  const uint32_t word = sizeof(X) == 4 ? 0xff800000u : __is_same(X, __nv_bfloat16) ? 0xff80ff80u : 0xfc00fc00u;
  return make_uint4(word, word, word, word);
}
// In one access whatever the compiler knows of the address.
__device__ __forceinline__ void store_global(void* to, const uint4& x) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// The 16-byte vectors that a row lies on, counted from the 128 bytes that it begins in, so that a warp's accesses cover
// whole sectors: vector v holds the elements v L - skew + (0 .. L - 1). Vectors that lie in the row are moved by
// one access, the ones at its ends (and rows that lie on other vectors than the row that was chosen) element by
// element.
template <class X>
struct Grid {
  int skew;

  __device__ __forceinline__ explicit Grid(const void* row) : skew(int((uintptr_t(row) & 127) / sizeof(X))) {}
  __device__ __forceinline__ int vectors(int elements) const { return (elements + skew + kLanes<X> - 1) / kLanes<X>; }
  __device__ __forceinline__ int vector_of(int element) const { return (element + skew) / kLanes<X>; }
  __device__ __forceinline__ int first(int v) const { return v * kLanes<X> - skew; }
  __device__ __forceinline__ bool has(const void* row) const {
    return (uintptr_t(row) - uintptr_t(skew) * sizeof(X)) % 16 == 0;
  }
  // True where vector v of the row may be moved at once.
  __device__ __forceinline__ bool whole(const void* row, int v, int elements) const {
    const int e = first(v);
    return e >= 0 && e + kLanes<X> <= elements && has(row);
  }
  // Elements past the ends are fill.
  __device__ __forceinline__ uint4 load(const X* row, int v, int elements, float fill = -INFINITY) const {
    const int e = first(v);
    if (whole(row, v, elements)) return *reinterpret_cast<const uint4*>(row + e);
    float x[kLanes<X>];
#pragma unroll
    for (int i = 0; i < kLanes<X>; ++i) {
      const int at = e + i;
      x[i] = at >= 0 && at < elements ? to_float(row[at]) : fill;
    }
    return pack<X>(x);
  }
  __device__ __forceinline__ void store(X* row, int v, int elements, const float (&x)[kLanes<X>]) const {
    const int e = first(v);
    if (whole(row, v, elements)) {
      store_global(row + e, pack<X>(x));
      return;
    }
#pragma unroll
    for (int i = 0; i < kLanes<X>; ++i) {
      const int at = e + i;
      if (at >= 0 && at < elements) row[at] = from_float<X>(x[i]);
    }
  }
};

// The vectors at the ends of a row, and all of one that lies on other vectors than the chosen row, go element by
// element. One copy of the code.
template <class X>
__device__ __noinline__ uint4 load_edge(const X* row, int first, int elements, float fill) {
  float x[kLanes<X>];
#pragma unroll
  for (int l = 0; l < kLanes<X>; ++l) x[l] = first + l >= 0 && first + l < elements ? to_float(row[first + l]) : fill;
  return pack<X>(x);
}
template <class X>
__device__ __noinline__ void store_edge(X* row, int first, int elements, uint4 raw) {
  float x[kLanes<X>];
  unpack<X>(raw, x);
#pragma unroll
  for (int l = 0; l < kLanes<X>; ++l)
    if (first + l >= 0 && first + l < elements) row[first + l] = from_float<X>(x[l]);
}

// The vectors of a row that lie whole in it, for loops over them: a comparison and an addition each.
template <class X, class P>
struct WholeVectors {
  P* base;  // of vector 0
  int from = 0;
  unsigned count = 0;

  __device__ __forceinline__ WholeVectors(const Grid<X>& grid, P* row, int elements) : base(row - grid.skew) {
    if (!grid.has(row)) return;
    from = (grid.skew + kLanes<X> - 1) / kLanes<X>;
    count = unsigned(max(0, (elements + grid.skew) / kLanes<X> - from));
  }
  __device__ __forceinline__ bool has(int v) const { return unsigned(v - from) < count; }
  __device__ __forceinline__ P* at(int v) const { return reinterpret_cast<P*>(uintptr_t(base) + int64_t(v) * 16); }
};

__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
// 16 bytes from global to shared memory, past the registers; complete after copies_done, for the thread that asked.
__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  copy_async(shared_address(shared), global);
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// The copies that the thread asked for since the last group are one; all but the newest N groups are complete.
__device__ __forceinline__ void copies_are_a_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void copies_done_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A struct as 32-bit words, which is what travels between threads.
template <class T>
struct Words {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t word[sizeof(T) / 4];

  template <class Make>
  static __device__ __forceinline__ T make(Make make_word) {
    Words words;
#pragma unroll
    for (int i = 0; i < int(sizeof(T) / 4); ++i) words.word[i] = make_word(i);
    T out;
    memcpy(&out, &words, sizeof(T));
    return out;
  }
};

template <class T>
__device__ __forceinline__ T shuffle_xor(const T& value, int mask) {
  Words<T> mine;
  memcpy(&mine, &value, sizeof(T));
  return Words<T>::make([&](int i) { return __shfl_xor_sync(0xffffffffu, mine.word[i], mask); });
}

// A block's share of a reduction, for the other blocks of its cluster to read.
constexpr int kReductionBytes = 64, kMaxWarps = 16, kMaxCluster = 16;
constexpr int kScratchBytes = (kMaxWarps + 2) * kReductionBytes;

// All threads of a block, or of a cluster of blocks, that work on one row. T() is the identity of merge. Results are
// those of the first warp, the same in each of its threads: all warps merge in one order.
struct Team {
  char* scratch;  // kScratchBytes of shared memory
  int thread, threads, block, blocks;
  int round = 0, turn = 0;

  __device__ __forceinline__ Team(char* scratch, int blocks)
      : scratch(scratch),
        thread(int(threadIdx.x)),
        threads(int(blockDim.x)),
        block(blocks == 1 ? 0 : int(blockIdx.x % unsigned(blocks))),
        blocks(blocks) {}

  __device__ __forceinline__ bool leads() const { return thread == 0 && block == 0; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Merged over the warp: of LANES neighbours each.
  template <int LANES = 32, class T, class Merge>
  static __device__ __forceinline__ T over_warp(T value, Merge merge) {
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) value = merge(value, shuffle_xor(value, mask));
    return value;
  }

  // values: how many threads, from the first on, have a value. over<LANES>(x) merges over LANES neighbours.
  template <class T, class Over>
  __device__ __forceinline__ T over_block_by(T value, int values, const Over& over) {
    static_assert(sizeof(T) <= kReductionBytes);
    const int lane = thread % 32, warp = thread / 32, parts = min(threads, values + 31) / 32;
    if (warp < parts) value = over(value, Lanes<32>());
    if (parts <= 1) return value;
    // One half of the parts is written while the other may still be read.
    T* const mine = &at<T>(turn);
    turn = kMaxWarps / 2 - turn;
    if (lane == 0 && warp < parts) part(mine, warp) = value;
    sync();
    if (warp == 0) value = over(lane < parts ? part(mine, lane) : T(), Lanes<kMaxWarps / 2>());
    return value;
  }
  template <int N>
  struct Lanes {
    static constexpr int value = N;
  };
  template <class Merge>
  struct Plain {
    Merge merge;
    template <class T, int LANES>
    __device__ __forceinline__ T operator()(const T& value, Lanes<LANES>) const {
      return over_warp<LANES>(value, merge);
    }
  };
  template <class T, class Merge>
  __device__ __forceinline__ T over_block(T value, Merge merge, int values = kMaxWarps * 32) {
    return over_block_by(value, values, Plain<Merge>{merge});
  }

  // At most twice a kernel; end() must follow.
  template <class T, class Merge>
  __device__ __forceinline__ T over_cluster(T value, Merge merge) {
    return over_blocks(over_block(value, merge), merge);
  }
  // Of what the first warp of each block has alike in its threads.
  template <class T, class Merge>
  __device__ __forceinline__ T over_blocks(T value, Merge merge) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1) {
      T& mine = at<T>(kMaxWarps + round++);
      if (thread == 0) mine = value;
      sync_cluster();
      if (thread < 32) value = over_warp<kMaxCluster>(thread < blocks ? read_from(mine, thread) : T(), merge);
    }
#endif
    return value;
  }

  __device__ __forceinline__ void sync_cluster() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    if (blocks > 1)
      asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  // No block leaves while another one may read from it.
  __device__ __forceinline__ void end() const { sync_cluster(); }

 private:
  template <class T>
  __device__ __forceinline__ T& at(int slot) const {
    return *reinterpret_cast<T*>(scratch + slot * kReductionBytes);
  }
  template <class T>
  static __device__ __forceinline__ T& part(T* first, int number) {
    return *reinterpret_cast<T*>(reinterpret_cast<char*>(first) + number * kReductionBytes);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  template <class T>
  static __device__ __forceinline__ T read_from(const T& mine, int block) {
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(&mine)), "r"(block));
    return Words<T>::make([&](int i) {
      uint32_t word;
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word) : "r"(there + 4 * i) : "memory");
      return word;
    });
  }
#endif
};

}  // namespace cuda
}  // namespace kdk
