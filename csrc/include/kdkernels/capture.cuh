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
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return Key(ordered) << 32 | uint32_t(~id);
}
__device__ __forceinline__ float logit_of(Key key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int id_of(Key key) { return int(~uint32_t(key)); }

// Shared by the threads of a block; keys follow in dynamic shared memory.
struct Shared {
  unsigned histogram[256];
  int counts[kWarps];
  float numbers[kWarps];
  unsigned digit, above;
};

// Sum of the numbers of the threads before this one, and of all threads.
__device__ __forceinline__ int scan(Shared& shared, int mine, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int up_to = mine;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(~0u, up_to, d);
    if (lane >= d) up_to += before;
  }
  if (lane == 31) shared.counts[warp] = up_to;
  __syncthreads();
  int earlier = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) earlier += shared.counts[w];
    total += shared.counts[w];
  }
  __syncthreads();
  return earlier + up_to - mine;
}

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

// A lower bound that exactly k of count distinct keys reach, with the logit of the k-th largest: radix select, a byte
// at a time. The bytes of the ids are looked at only where logits are equal.
__device__ __forceinline__ Key select(Shared& shared, const Key* keys, int count, int k) {
  Key bound = 0, mask = 0;
  unsigned wanted = unsigned(k);
  for (int shift = 56; shift >= 0; shift -= 8) {
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
    if (shift <= 32 && shared.histogram[digit] == wanted) break;
    __syncthreads();
  }
  __syncthreads();
  return bound;
}

// The larger keys first; there is room up to a power of two.
__device__ __forceinline__ void sort(Key* keys, int count) {
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + int(threadIdx.x); i < size; i += kThreads) keys[i] = 0;
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += kThreads) {
        const int a = i / step * 2 * step + i % step, b = a + step;
        const Key low = keys[a], high = keys[b];
        if ((low < high) == ((a & run) == 0)) keys[a] = high, keys[b] = low;
      }
      __syncthreads();
    }
  }
}

// A block's state of its row; the same in all threads but for rest.
struct State {
  int count = 0;                  // of candidates
  float threshold = -infinity();  // no logit up to here is among the k largest any more
  float c = 0, reference = 0;     // x = logit c - reference
  float rest = 0;                 // sum of 2^x of this thread's logits that are no candidates

  __device__ __forceinline__ float exponential(float logit) const { return exp2_approx(fmaf(logit, c, -reference)); }
};

// A first threshold from the largest logits that the threads have of a step: k of them are logits of the row, so that
// no smaller one is among its k largest. Without it all logits of the step would be candidates.
__device__ __forceinline__ void begin_with(Shared& shared, Key* keys, State& state, float high, int k) {
  // Behind the candidates, with room for a step's logits.
  keys += state.count;
  keys[threadIdx.x] = key_of(isnan(high) ? -infinity() : high, int(threadIdx.x));
  __syncthreads();
  // The next number below: what is equal to the bound may be among the k largest.
  const Key bound = select(shared, keys, kThreads, k);
  const float threshold = logit_of(bound - (Key(1) << 32));
  if (logit_of(bound) == -infinity() || threshold == -infinity()) return;
  // Below 0 stands -0, which is no less.
  state.threshold = threshold == 0 ? -1.17549435e-38f : threshold;
  state.reference = state.threshold * state.c;
}

// Leaves the k largest candidates, raises the threshold to the last of them.
__device__ __forceinline__ void thin_out(Shared& shared, Key* keys, State& state, int k) {
  __syncthreads();
  const Key bound = select(shared, keys, state.count, k);
  state.threshold = logit_of(bound);
  const float reference = state.threshold * state.c;
  // The first reference may be far above; then there is no sum yet.
  if (state.rest != 0) state.rest *= exp2_approx(state.reference - reference);
  state.reference = reference;
  int kept = 0;
  for (int begin = 0; begin < state.count; begin += kThreads) {
    const int i = begin + int(threadIdx.x);
    const Key key = i < state.count ? keys[i] : 0;
    const bool keep = i < state.count && key >= bound;
    if (i < state.count && !keep) state.rest += state.exponential(logit_of(key));
    int total;
    const int place = kept + scan(shared, keep, total);
    if (keep) keys[place] = key;
    kept += total;
  }
  state.count = kept;
  __syncthreads();
}

// A row cut into 16-byte vectors; what lies before and after them is the first and the last step.
template <class X>
struct Row {
  static constexpr int kLanes = 16 / int(sizeof(X)), kVectors = kItems / kLanes;

  const X* x;
  int n, head, vectors, tail;

  __device__ __forceinline__ Row(const X* logits, int columns) : x(logits), n(columns) {
    // The vectors of a warp begin with a sector of 32 bytes, of which they would share the last one otherwise.
    const int misaligned = int(reinterpret_cast<uintptr_t>(x) % 32);
    head = min(n, misaligned == 0 ? 0 : (32 - misaligned) / int(sizeof(X)));
    vectors = (n - head) / kLanes;
    tail = n - head - vectors * kLanes;
  }
  __device__ __forceinline__ int begin() const { return head > 0 ? -1 : 0; }
  __device__ __forceinline__ int tiles() const { return (vectors + kThreads * kVectors - 1) / (kThreads * kVectors); }
  __device__ __forceinline__ int end() const { return tiles() + (tail > 0); }
  __device__ __forceinline__ bool ragged(int step) const { return step < 0 || step >= tiles(); }

  // The id of this thread's i-th logit of a step.
  __device__ __forceinline__ int id(int step, int i) const {
    if (ragged(step)) return (step < 0 ? 0 : n - tail) + int(threadIdx.x);
    const int vector = (step * kVectors + i / kLanes) * kThreads + int(threadIdx.x);
    return head + vector * kLanes + i % kLanes;
  }
  // This thread's logits of a step as they are stored, -inf where there is none.
  __device__ __forceinline__ void load(int step, uint4 (&out)[kVectors]) const {
    float none[kLanes];
#pragma unroll
    for (float& value : none) value = -infinity();
    if (ragged(step)) {
#pragma unroll
      for (int u = 1; u < kVectors; ++u) out[u] = cuda::pack<X>(none);
      if (int(threadIdx.x) < (step < 0 ? head : tail)) none[0] = to_float(x[id(step, 0)]);
      out[0] = cuda::pack<X>(none);
      return;
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int vector = (step * kVectors + u) * kThreads + int(threadIdx.x);
      out[u] = vector < vectors ? __ldcs(reinterpret_cast<const uint4*>(x + head) + vector) : cuda::pack<X>(none);
    }
  }
};

// Candidates and sum of one step's logits.
template <class X>
__device__ __forceinline__ void take(Shared& shared, Key* keys, State& state, const Row<X>& row, int step, int k,
                                     const uint4 (&raw)[Row<X>::kVectors]) {
  constexpr int kLanes = Row<X>::kLanes;
  float x[kItems];
  uint4 most = raw[0];
#pragma unroll
  for (int u = 0; u < Row<X>::kVectors; ++u) {
    float vector[kLanes];
    cuda::unpack<X>(raw[u], vector);
#pragma unroll
    for (int l = 0; l < kLanes; ++l) x[u * kLanes + l] = vector[l];
    most = cuda::packed_max<X>(most, raw[u]);
  }
  const float high = cuda::largest<X>(most);
  if (state.threshold == -infinity() && k <= kThreads && !row.ragged(step)) begin_with(shared, keys, state, high, k);
  unsigned hits = 0;
  float rest[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) rest[i] = x[i];
  // Seldom, once the threshold has risen.
  if (high > state.threshold) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool hit = x[i] > state.threshold;
      hits |= unsigned(hit) << i;
      rest[i] = hit ? -infinity() : x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) state.rest += state.exponential(rest[i]);
  if (!__syncthreads_or(int(hits))) return;
  int total;
  int place = state.count + scan(shared, __popc(hits), total);
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (hits >> i & 1) keys[place++] = key_of(x[i], row.id(step, i));
  state.count += total;
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
    take(shared, keys, state, row, step, k, raw);
    // The first threshold comes early, the others when they must.
    if (state.count > k + (state.threshold == -infinity() ? 0 : kSlack)) thin_out(shared, keys, state, k);
  }
  if (state.count > k) thin_out(shared, keys, state, k);
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
