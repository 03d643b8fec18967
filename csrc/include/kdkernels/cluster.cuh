// A cluster of blocks that works on one row after the other: its barriers, and sums over it that take one trip. And the
// numbers of the dense kernels.
#pragma once

#include "async.cuh"
#include "functors.cuh"

#include "dense_plan.h"

namespace kdk {
namespace cuda {

constexpr float kLn2f = float(kLn2);
constexpr float kLowest = -3.402823466e38f;

// 1 / x of one number to the last bit or so.
__device__ __forceinline__ float reciprocal(float x) {
  const float r = reciprocal_fast(x);
  return fmaf(fmaf(-x, r, 1.0f), r, r);
}

// log(x / y) of two positive numbers, exact to its last bits where they are near each other.
__device__ __forceinline__ float log_of_ratio(float x, float y) {
  const float a = (x - y) * reciprocal_fast(x + y), b = a * a;
  const float near = fmaf(a * b, fmaf(b, fmaf(b, 2.0f / 7, 0.4f), 2.0f / 3), a + a);
  return b < 1.0f / 256 ? near : log2_fast(x * reciprocal_fast(y)) * kLn2f;
}

// total + weight * x, and total where the weight is 0 whatever x is.
__device__ __forceinline__ float add_product(float total, float weight, float x) {
  asm("{ .reg .pred p; setp.neu.f32 p, %1, 0f00000000; @p fma.rn.f32 %0, %1, %2, %0; }"
      : "+f"(total)
      : "f"(weight), "f"(x));
  return total;
}
__device__ __forceinline__ float product_or_0(float weight, float x) { return weight != 0 ? weight * x : 0.0f; }

// A sum that rounding leaves below 0 is 0, and NaN stays NaN.
__device__ __forceinline__ float at_least_0(float x) { return x < 0 ? 0.0f : x; }

__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  float out;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=f"(out) : "f"(x), "r"(mask));
  return out;
}

// Without a branch, around which the compiler would keep too much.
__device__ __forceinline__ uint4 load_shared_if(bool wanted, uint32_t address) {
  uint4 x;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
      " @p ld.shared.v4.b32 {%0, %1, %2, %3}, [%4]; }"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "r"(address), "r"(int(wanted))
      : "memory");
  return x;
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// A float as an integer of the same order.
__device__ __forceinline__ int order_of(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float of_order(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }

// The held kernels see this past the ends of a row: a number far below all logits, so that no difference is infinite
// and 0 times it is 0. fp16 has none.
template <class X>
constexpr float kFar = sizeof(X) == 2 && !__is_same(X, __nv_bfloat16) ? -INFINITY : -0x1p100f;
template <class X>
__device__ __forceinline__ uint4 far_vector() {
  const uint32_t word = sizeof(X) == 4 ? 0xf1800000u : __is_same(X, __nv_bfloat16) ? 0xf180f180u : 0xfc00fc00u;
  return make_uint4(word, word, word, word);
}

// All threads of the blocks that work on a row. Reductions give all threads the same bits. A block has waited for all
// that others store into it when it leaves.
struct Cluster {
  uint32_t control;  // address of the barriers: of the two stages, and of the two slots of reductions
  char* slots;
  int slot_bytes, part_bytes, thread, threads, warp, warps, block, blocks;
  int lanes = 32;  // neighbours that hold all parts of a reduction: a power of two
  int round = 0;

  __device__ __forceinline__ Cluster(char* shared, const DensePlan& plan)
      : control(shared_address(shared)),
        slots(shared + kDenseControlBytes),
        slot_bytes(plan.slot_bytes),
        part_bytes(plan.part_bytes),
        thread(int(threadIdx.x)),
        threads(int(blockDim.x)),
        warp(thread / 32),
        warps(threads / 32),
        block(plan.cluster == 1 ? 0 : int(blockIdx.x % unsigned(plan.cluster))),
        blocks(plan.cluster) {
    while (lanes / 2 >= warps * blocks) lanes /= 2;
  }

  __device__ __forceinline__ bool leads() const { return thread == 0 && block == 0; }
  __device__ __forceinline__ uint32_t full(int stage) const { return control + 8 * stage; }

  __device__ __forceinline__ void begin(bool bulk) const {
    if (bulk || blocks > 1) {
      if (thread == 0) {
        for (int i = 0; i < 2; ++i) barrier_init(full(i), 1);
        for (int i = 0; i < kReductionSlots; ++i) barrier_init(control + 16 + 8 * i, warps);
        barriers_are_made();
      }
      if (blocks > 1) {
        cluster_arrive_relaxed();
        cluster_wait();
      } else {
        __syncthreads();
      }
    }
  }
  // T() is the identity of merge, merge.over_warp gives every lane the same.
  template <class T, class Merge>
  __device__ __forceinline__ T over(T value, Merge merge) {
    static_assert(sizeof(T) % 16 == 0);
    value = merge.over_warp(value, 32);
    const int parts = warps * blocks;
    if (parts == 1) return value;
    const int slot = round % kReductionSlots, lane = thread % 32;
    const uint32_t parity = round / kReductionSlots & 1;
    char* const base = slots + slot * slot_bytes;
    // Of whatever type: nobody but this warp ever writes here, or in the same place of other blocks.
    T* const mine = reinterpret_cast<T*>(base + (block * warps + warp) * part_bytes);
    ++round;
    if (lane == 0) *mine = value;
    if (blocks == 1) {
      __syncthreads();
    } else {
      const uint32_t barrier = control + 16 + 8 * slot;
      if (lane == 0) {
        if (warp == 0) {
          barrier_expect(barrier, uint32_t((blocks - 1) * warps * int(sizeof(T))));
        } else {
          barrier_arrive(barrier);
        }
      }
      if (lane < blocks && lane != block) {
        const uint32_t to = in_block(shared_address(mine), lane), counts = in_block(barrier, lane);
        uint4 words[sizeof(T) / 16];
        memcpy(words, &value, sizeof(T));
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 16); ++i) store_async(to + 16 * i, words[i], counts);
      }
      barrier_wait<true>(barrier, parity);
    }
    T total = T();
#pragma unroll 4
    for (int i = lane & (lanes - 1); i < parts; i += 32)
      total = merge(total, *reinterpret_cast<const T*>(base + i * part_bytes));
    return merge.over_warp(total, lanes);
  }
};

// read: bits of the label's logit, which every block loads and one of them may overwrite, in place. That one waits for
// all parts, and a part that has the logit in it is not sent before the logit is there.
struct alignas(16) Tops {
  int s = INT32_MIN, t = INT32_MIN, read = 0, pad = 0;
};
struct MaxTops {
  __device__ __forceinline__ Tops operator()(const Tops& a, const Tops& b) const {
    Tops out;
    out.s = max(a.s, b.s);
    out.t = max(a.t, b.t);
    return out;
  }
  __device__ __forceinline__ Tops over_warp(const Tops& value, int) const {
    Tops out;
    out.s = __reduce_max_sync(0xffffffffu, value.s);
    out.t = __reduce_max_sync(0xffffffffu, value.t);
    out.read = value.read;
    return out;
  }
};

// Up to four sums at once, of which the first COUNT are in use.
struct alignas(16) Sums4 {
  float x[4] = {};
};
template <int COUNT>
struct AddSums4 {
  using T = Sums4;
  __device__ __forceinline__ T operator()(const T& a, const T& b) const {
    T out;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) out.x[i] = a.x[i] + b.x[i];
    return out;
  }
  __device__ __forceinline__ T over_warp(T value, int lanes) const {
    const auto add = [&](int mask) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i) value.x[i] += shuffle_xor(value.x[i], mask);
    };
    if (lanes == 32) {
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) add(mask);
    } else {
#pragma unroll 1
      for (int mask = lanes / 2; mask > 0; mask /= 2) add(mask);
    }
    return value;
  }
};

}  // namespace cuda
}  // namespace kdk
