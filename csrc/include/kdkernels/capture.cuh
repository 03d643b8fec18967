// The k largest logits of a row and the log of the mass of the others, one block a row, in one read of the logits.
//
// As on the CPU: a logit not above the threshold, the k-th largest so far, goes into the sum of the mass outside,
// relative to the threshold, so that no term exceeds 1 and nothing is ever subtracted. The rest are candidates in
// shared memory; when these get too many, a radix select keeps the k largest, the others join the sum and the threshold
// rises. Nothing depends on the order in which threads run: candidates find their places by prefix sums. Two more reads
// are made only of rows whose k-th largest logit is more than 62 nats above what all others have together.
//
// Bytes: V elements read and 8 K + 4 written a row. Framework-free.
#pragma once

#include <utility>

#include "device.cuh"

namespace kdk {
namespace capture {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kItems = 16;  // logits that a thread takes at a time
constexpr int kTile = kThreads * kItems;
constexpr int kSlack = 1024;  // candidates beyond k before they are thinned out
constexpr int kMaxK = 2048;
constexpr float kLn2 = 0.6931471805599453f, kLog2e = 1.4426950408889634f;

using Key = unsigned long long;

__host__ __device__ constexpr int shared_bytes(int k) { return (k + kSlack + kTile) * int(sizeof(Key)); }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

using cuda::to_float;

// A logit and its id as one integer, larger for the larger logit, and among equals for the lower id.
__device__ __forceinline__ Key key_of(float logit, int id) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
  const uint32_t ordered = bits ^ (uint32_t(int(bits) >> 31) | 0x80000000u);
  Key key;
  asm("mov.b64 %0, {%1, %2};" : "=l"(key) : "r"(~id), "r"(ordered));
  return key;
}
__device__ __forceinline__ float logit_of(Key key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int id_of(Key key) { return int(~uint32_t(key)); }

// visit(0), ... visit(N - 1), of numbers that are types.
template <int... I, class Visit>
__device__ __forceinline__ void for_numbers(std::integer_sequence<int, I...>, Visit visit) {
  (visit(std::integral_constant<int, I>()), ...);
}
template <int N, class Visit>
__device__ __forceinline__ void for_numbers(Visit visit) {
  for_numbers(std::make_integer_sequence<int, N>(), visit);
}

// Shared by the threads of a block; keys follow in dynamic shared memory.
struct Shared {
  uint4 counts[2];  // of each warp, 16 bits; two in turn, so that one barrier a scan is enough
  unsigned histogram[256];
  float numbers[kWarps];
  unsigned digit, above;
};
static_assert(kWarps == 8, "counts of a scan");

__device__ __forceinline__ int halves(unsigned word) { return int(word & 0xffff) + int(word >> 16); }

// Sums of the numbers, below 2^16, of the threads before this one and of all threads.
struct Scan {
  int turn = 0, total = 0;
  unsigned before[4];  // masks of the counts of the warps before this one

  __device__ __forceinline__ Scan() {
    const int warp = threadIdx.x / 32;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      before[pair] = warp > 2 * pair + 1 ? ~0u : warp > 2 * pair ? 0xffffu : 0u;
      // Kept from the compiler, which would make them again for every scan.
      asm volatile("" : "+r"(before[pair]));
    }
  }
  // none: the number is 0 in all threads of the warp.
  __device__ __forceinline__ int operator()(Shared& shared, int mine, bool none) {
    int up_to = mine;
    if (!none) {
      for_numbers<5>([&](auto power) {
        asm volatile("{ .reg .pred p; .reg .b32 x; shfl.sync.up.b32 x|p, %0, %1, 0, -1; @p add.s32 %0, %0, x; }"
                     : "+r"(up_to)
                     : "n"(1 << decltype(power)::value));
      });
    }
    if (threadIdx.x % 32 == 31) reinterpret_cast<uint16_t*>(&shared.counts[turn])[threadIdx.x / 32] = uint16_t(up_to);
    __syncthreads();
    const uint4 counts = shared.counts[turn];
    turn ^= 1;
    // No half passes 2^16, for the total does not.
    total = halves(counts.x + counts.y + counts.z + counts.w);
    if (none) return 0;
    return up_to - mine +
           halves((counts.x & before[0]) + (counts.y & before[1]) + (counts.z & before[2]) + (counts.w & before[3]));
  }
};

// One number of all threads, combined in a fixed order.
template <class Combine>
__device__ __forceinline__ float reduce(Shared& shared, float mine, Combine combine) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) mine = combine(mine, __shfl_xor_sync(~0u, mine, d));
  if (threadIdx.x % 32 == 0) shared.numbers[threadIdx.x / 32] = mine;
  __syncthreads();
  float all = shared.numbers[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all = combine(all, shared.numbers[w]);
  __syncthreads();
  return all;
}
__device__ __forceinline__ float sum(Shared& shared, float mine) {
  return reduce(shared, mine, [](float a, float b) { return a + b; });
}

// A lower bound that exactly k of count distinct keys reach: radix select, a byte at a time. The bytes of the ids are
// looked at only where logits are equal, and not where columns is 0: at least k keys reach the bound then. No logit
// that is larger than the k-th largest is below it.
template <class X>
__device__ __forceinline__ Key select(Shared& shared, const Key* keys, int count, int k, int columns) {
  Key bound = 0, mask = 0;
  unsigned wanted = unsigned(k);
  for (int shift = 56; shift >= 0; shift -= 8) {
    if (__is_same(X, __nv_bfloat16) && shift == 40) {
      // All the same in both bytes: a bf16 as a float, whose bits are turned where it is negative.
      if (!(bound >> 63)) bound |= Key(0xffff) << 32;
      shift = 24;
    }
    if (shift == 24) {
      if (columns == 0) break;
      for (; shift > 0 && columns >> shift == 0; shift -= 8) bound |= Key(255) << shift;
      mask = ~Key(0) << (shift + 8);
    }
    shared.histogram[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads)
      if ((keys[i] & mask) == bound) atomicAdd(&shared.histogram[(keys[i] >> shift) & 255], 1u);
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane l has the digits from 255 - 8 l down.
      const int high = 255 - 8 * int(threadIdx.x);
      unsigned mine = 0;
      for (int d = 0; d < 8; ++d) mine += shared.histogram[high - d];
      unsigned above = mine;
      for (int d = 1; d < 32; d *= 2) {
        const unsigned before = __shfl_up_sync(~0u, above, d);
        if (int(threadIdx.x) >= d) above += before;
      }
      above -= mine;
      if (above < wanted && wanted <= above + mine) {
        int digit = high;
        while (above + shared.histogram[digit] < wanted) above += shared.histogram[digit--];
        shared.digit = unsigned(digit);
        shared.above = above;
      }
    }
    __syncthreads();
    const unsigned digit = shared.digit;
    wanted -= shared.above;
    bound |= Key(digit) << shift;
    mask |= Key(255) << shift;
    // Not before there are a few digits: a bound far below lets many logits pass.
    const bool all = shift <= 48 && shared.histogram[digit] == wanted;
    __syncthreads();
    if (all) break;
  }
  // The first bytes alone may be those of a NaN below -inf.
  return max(bound, Key(0x007fffff) << 32);
}

// The larger keys first; there is room up to a power of two.
__device__ __forceinline__ void sort(Key* keys, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + int(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  // Pairs up to 32 apart stay among the 64 keys of a warp: no other one waits for them, nor takes part in the sort of
  // 64 keys.
  if (size > 64 || threadIdx.x < 32) {
    for (int run = 2; run <= size; run *= 2) {
      for (int step = run / 2; step > 0; step /= 2) {
        for (int i = threadIdx.x; i < size / 2; i += kThreads) {
          const int a = 2 * i - (i & (step - 1)), b = a + step;
          const Key low = keys[a], high = keys[b];
          if ((low < high) == ((a & run) == 0)) keys[a] = high, keys[b] = low;
        }
        if (step > 32 || (step == 1 && run > 32 && run < size)) {
          __syncthreads();
        } else {
          __syncwarp();
        }
      }
    }
  }
  __syncthreads();
}

// A block's state of its row; the same in all threads but for rest.
struct State {
  int count = 0;  // of candidates
  Scan scan;
  float threshold = -infinity();  // no logit up to here is among the k largest any more
  float c = 0, reference = 0;     // x = logit c - reference
  float rest = 0;                 // sum of 2^x of this thread's logits that are no candidates

  __device__ __forceinline__ float exponential(float logit) const { return exp2_approx(fmaf(logit, c, -reference)); }
};

// A first threshold from the largest logits that the threads have of a step: k of them are logits of the row, so that
// no smaller one is among its k largest. Without it all logits of the step would be candidates.
template <class X>
__device__ __forceinline__ void begin_with(Shared& shared, Key* keys, State& state, float high, int k) {
  // Behind the candidates, with room for a step's logits.
  keys += state.count;
  keys[threadIdx.x] = key_of(isnan(high) ? -infinity() : high, int(threadIdx.x));
  __syncthreads();
  // The next number below: what is equal to the bound may be among the k largest.
  const Key bound = select<X>(shared, keys, kThreads, k, 0);
  const float threshold = logit_of(bound - (Key(1) << 32));
  if (logit_of(bound) == -infinity() || threshold == -infinity()) return;
  // Below 0 stands -0, which is no less.
  state.threshold = threshold == 0 ? -1.17549435e-38f : threshold;
  state.reference = state.threshold * state.c;
}

// Leaves the k largest candidates, raises the threshold to the last of them.
template <class X>
__device__ __forceinline__ void thin_out(Shared& shared, Key* keys, State& state, int k, int columns) {
  __syncthreads();
  const Key bound = select<X>(shared, keys, state.count, k, columns);
  state.threshold = logit_of(bound);
  const float reference = state.threshold * state.c;
  // The first reference may be far above; then there is no sum yet.
  if (state.rest != 0) state.rest *= exp2_approx(state.reference - reference);
  state.reference = reference;
  int kept = 0;
  constexpr int kAtOnce = 4;
  for (int begin = 0; begin < state.count; begin += kAtOnce * kThreads) {
    Key mine[kAtOnce];
    int number = 0;
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int i = begin + u * kThreads + int(threadIdx.x);
      mine[u] = 0;  // of none
      if (i >= state.count) continue;
      mine[u] = keys[i];
      if (mine[u] >= bound) {
        ++number;
      } else {
        state.rest += state.exponential(logit_of(mine[u]));
        mine[u] = 0;
      }
    }
    int place = kept + state.scan(shared, number, !__any_sync(~0u, number != 0));
    if (number != 0) {
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        if (mine[u] != 0) keys[place++] = mine[u];
    }
    kept += state.scan.total;
  }
  state.count = kept;
  __syncthreads();
}

// A row cut into 16-byte vectors; what lies before and after them is the first and the last step.
template <class X>
struct Row {
  static constexpr int kLanes = 16 / int(sizeof(X)), kVectors = kItems / kLanes;

  const X* x;
  int n, head, vectors, tail, tiles;
  const uint4* mine;  // this thread's first vector

  __device__ __forceinline__ Row(const X* logits, int columns) : x(logits), n(columns) {
    // The vectors of a warp begin with a sector of 32 bytes, of which they would share the last one otherwise.
    const int misaligned = int(reinterpret_cast<uintptr_t>(x) % 32);
    head = min(n, misaligned == 0 ? 0 : (32 - misaligned) / int(sizeof(X)));
    vectors = (n - head) / kLanes;
    tail = n - head - vectors * kLanes;
    tiles = (vectors + kThreads * kVectors - 1) / (kThreads * kVectors);
    mine = reinterpret_cast<const uint4*>(x + head) + threadIdx.x;
    // Kept from the compiler, which would make them again for every step.
    asm volatile("" : "+r"(head), "+r"(vectors), "+r"(tiles), "+l"(mine));
  }
  __device__ __forceinline__ int begin() const { return head > 0 ? -1 : 0; }
  __device__ __forceinline__ int end() const { return tiles + (tail > 0); }
  __device__ __forceinline__ bool ragged(int step) const { return unsigned(step) >= unsigned(tiles); }

  // The id of this thread's first logit of a step.
  __device__ __forceinline__ int id(int step) const {
    if (ragged(step)) return (step < 0 ? 0 : n - tail) + int(threadIdx.x);
    return head + (step * kVectors * kThreads + int(threadIdx.x)) * kLanes;
  }
  // This thread's logits of a step as they are stored, -inf where there is none.
  __device__ __forceinline__ void load(int step, uint4 (&out)[kVectors]) const {
    float none[kLanes];
#pragma unroll
    for (float& value : none) value = -infinity();
    if (ragged(step)) {
#pragma unroll
      for (int u = 1; u < kVectors; ++u) out[u] = cuda::pack<X>(none);
      if (int(threadIdx.x) < (step < 0 ? head : tail)) none[0] = to_float(x[id(step)]);
      out[0] = cuda::pack<X>(none);
      return;
    }
    const int first = step * kVectors * kThreads, left = vectors - first - int(threadIdx.x);
#pragma unroll
    for (int u = 0; u < kVectors; ++u)
      out[u] = u * kThreads < left ? __ldcs(mine + first + u * kThreads) : cuda::pack<X>(none);
  }
};

// x, or -inf where it is above the threshold; then bit 31 - I is set.
template <int I>
__device__ __forceinline__ float not_above(float x, float threshold, unsigned& hits) {
  float out;
  asm("{ .reg .pred p; setp.gt.f32 p, %2, %3; selp.f32 %0, 0fFF800000, %2, p; @p or.b32 %1, %1, %4; }"
      : "=&f"(out), "+r"(hits)
      : "f"(x), "f"(threshold), "n"(0x80000000u >> I));
  return out;
}
template <int FIRST, int N, int... I>
__device__ __forceinline__ void add_up(State& state, const float (&x)[N], unsigned& hits,
                                       std::integer_sequence<int, I...>) {
  ((state.rest += state.exponential(not_above<FIRST + I>(x[I], state.threshold, hits))), ...);
}

template <class X>
__device__ __forceinline__ float load_logit(uint32_t address) {
  if constexpr (sizeof(X) == 4) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
  } else {
    uint16_t bits;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
    float low, high;
    cuda::unpack<X>(bits, low, high);
    return low;
  }
}

// Candidates and sum of one step's logits.
template <class X>
__device__ __forceinline__ void take(Shared& shared, Key* keys, uint4* taken, State& state, const Row<X>& row, int step,
                                     int k, const uint4 (&raw)[Row<X>::kVectors]) {
  constexpr int kLanes = Row<X>::kLanes, kVectors = Row<X>::kVectors;
  uint4 most = raw[0];
#pragma unroll
  for (int u = 1; u < kVectors; ++u) most = cuda::packed_max<X>(most, raw[u]);
  const float high = cuda::largest<X>(most);
  if (state.threshold == -infinity() && k <= kThreads && !row.ragged(step)) begin_with<X>(shared, keys, state, high, k);
  unsigned hits = 0;
  const bool any = __any_sync(~0u, high > state.threshold);
  for_numbers<kVectors>([&](auto number) {
    constexpr int u = decltype(number)::value;
    float x[kLanes];
    cuda::unpack<X>(raw[u], x);
    if (any) {
      add_up<u * kLanes>(state, x, hits, std::make_integer_sequence<int, kLanes>());
    } else {
#pragma unroll
      for (float value : x) state.rest += state.exponential(value);
    }
  });
  int place = state.count + state.scan(shared, __popc(hits), !any);
  state.count += state.scan.total;
  if (hits == 0) return;
  // Which one it is decides at run time, so that it has to have an address.
#pragma unroll
  for (int u = 0; u < kVectors; ++u) taken[u * kThreads + int(threadIdx.x)] = raw[u];
  const uint32_t at = cuda::shared_address(taken + threadIdx.x);
  const int id = row.id(step);
  uint32_t to = cuda::shared_address(keys + place);
  while (hits != 0) {
    const int i = __clz(int(hits)), vector = i / kLanes;
    hits ^= 0x80000000u >> i;
    const float logit = load_logit<X>(at + i * int(sizeof(X)) + vector * (kThreads * 16 - 16));
    asm volatile("st.shared.b64 [%0], %1;" ::"r"(to), "l"(key_of(logit, id + i + vector * (kThreads - 1) * kLanes))
                 : "memory");
    to += sizeof(Key);
  }
}

// Base-2 logarithm of the mass outside, relative to a reference; keys are sorted.
template <class X>
__device__ __forceinline__ float log2_rest(Shared& shared, const Key* keys, const State& state, const Row<X>& row,
                                           int k, float rest, float reference) {
  if (state.count < k || state.count == row.n) return -infinity();
  if (!(rest < 0x1p-90f)) return state.reference - reference + log2f(rest);
  // All others have left the range of their exponentials: take these relative to their own maximum.
  const Key last = keys[k - 1];
  float high = -infinity(), total = 0;
  for (int i = threadIdx.x; i < row.n; i += kThreads) {
    const float x = to_float(row.x[i]);
    if (key_of(x, i) < last) high = fmaxf(high, x);
  }
  high = reduce(shared, high, [](float a, float b) { return fmaxf(a, b); });
  if (high == -infinity()) return high;
  for (int i = threadIdx.x; i < row.n; i += kThreads) {
    const float x = to_float(row.x[i]);
    if (key_of(x, i) < last) total += exp2_approx((x - high) * state.c);
  }
  return fmaf(high, state.c, -reference) + log2f(sum(shared, total));
}

// logits [B, L, V] with strides in elements and unit stride in V, rows i = b * L + l; ids, logprobs [N, K], tail [N];
// temperature_rows [N] or null. Block i has row i; k is at most kMaxK.
template <class X>
__global__ void __launch_bounds__(kThreads, 2)
    capture_topk_kernel(const X* logits, int64_t stride_b, int64_t stride_l, int64_t length, int columns, int k,
                        const float* temperature_rows, int64_t temperature_stride, float temperature, int* ids,
                        float* logprobs, float* tail) {
  extern __shared__ __align__(16) unsigned char dynamic_shared[];
  __shared__ Shared shared;
  __shared__ uint4 taken[kThreads * Row<X>::kVectors];  // each thread's own
  Key* keys = reinterpret_cast<Key*>(dynamic_shared);
  const int64_t index = blockIdx.x;
  const Row<X> row(logits + index / length * stride_b + index % length * stride_l, columns);
  ids += index * k;
  logprobs += index * k;

  State state;
  state.c = kLog2e / (temperature_rows == nullptr ? temperature : temperature_rows[index * temperature_stride]);
  uint4 next[Row<X>::kVectors];
  row.load(row.begin(), next);
  for (int step = row.begin(); step < row.end(); ++step) {
    uint4 raw[Row<X>::kVectors];
#pragma unroll
    for (int u = 0; u < Row<X>::kVectors; ++u) raw[u] = next[u];
    if (step + 1 < row.end()) row.load(step + 1, next);
    take(shared, keys, taken, state, row, step, k, raw);
    // The first threshold comes early, the others when they must.
    if (state.count > k + (state.threshold == -infinity() ? 0 : kSlack)) thin_out<X>(shared, keys, state, k, columns);
  }
  if (state.count > k) thin_out<X>(shared, keys, state, k, columns);
  __syncthreads();
  const float rest = sum(shared, state.rest);
  sort(keys, state.count);

  const int count = state.count;
  const float top = count == 0 ? infinity() : logit_of(keys[0]);
  if (isnan(rest) || top == infinity()) {
    for (int j = threadIdx.x; j < k; j += kThreads) {
      ids[j] = j;
      logprobs[j] = __int_as_float(0x7fc00000);
    }
    if (threadIdx.x == 0) tail[index] = __int_as_float(0x7fc00000);
    return;
  }
  const float reference = top * state.c;
  const float outside = log2_rest(shared, keys, state, row, k, rest, reference);
  float inside = 0;
  for (int j = threadIdx.x; j < count; j += kThreads)
    inside += exp2_approx(fmaf(logit_of(keys[j]), state.c, -reference));
  const float log2_z = log2f(sum(shared, inside) + exp2_approx(outside));
  for (int j = threadIdx.x; j < k; j += kThreads) {
    ids[j] = j < count ? id_of(keys[j]) : -1;
    logprobs[j] = j < count ? kLn2 * (fmaf(logit_of(keys[j]), state.c, -reference) - log2_z) : -infinity();
  }
  if (threadIdx.x == 0) tail[index] = fminf(0.0f, kLn2 * (outside - log2_z));
}

}  // namespace capture
}  // namespace kdk
