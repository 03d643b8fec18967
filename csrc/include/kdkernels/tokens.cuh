// Log-probabilities of given tokens on CUDA, and their backward: one block a row, forward 1 read, backward 1 read and 1
// write, 16 bytes at a time whatever the number of columns.
//
// Forward keeps in each thread the largest logit so far and sums relative to it; a batch of vectors is reduced to its
// maximum first, so that the sums shrink once a batch. The logits of the ids are gathered: picking them out of the
// vectors would cost two instructions of every column. Backward writes the part of the gradient that is proportional to
// q, and after a barrier the columns of the ids once more, from what it gathered before the first store: it may write
// over the logits.
//
// The mass outside the ids is summed for itself, over the columns that a bitmap in shared memory does not mark.
#pragma once

#include "device.cuh"

#include <cfloat>
#include <type_traits>

#include "token_plan.h"

namespace kdk {
namespace cuda {

// An exponent whose power of two is 0, in place of -inf: 0 times it is 0.
constexpr float kFloorExponent = -65536.0f;

__device__ __forceinline__ float exponent_of(float x, float high, float scale) { return (x - high) * scale; }
__device__ __forceinline__ float floored(float exponent) { return fmaxf(exponent, kFloorExponent); }

template <bool>
struct EntropySum {};
template <>
struct EntropySum<true> {
  float weighted = 0, pad = 0;  // shared memory is read 8 and 16 bytes at a time
};
template <bool>
struct StatsSums {};
template <>
struct StatsSums<true> {
  float squares = 0, mean = 0;
};

// Sums of forward over the columns of a row: e = 2^((x - high) scale), e times its exponent, e^2, and the mean of x.
template <bool ENTROPY, bool STATS>
struct TokenSums : EntropySum<ENTROPY>, StatsSums<STATS> {
  float high = -FLT_MAX, z = 0;

  // Makes the sums relative to another maximum.
  __device__ __forceinline__ void move(float to, float scale) {
    const float shift = floored(exponent_of(high, to, scale)), factor = exp2_fast(shift);
    if constexpr (ENTROPY) this->weighted = fmaf(this->weighted, factor, z * factor * shift);
    if constexpr (STATS) this->squares *= factor * factor;
    z *= factor;
    high = to;
  }

  // top: the largest of x.
  template <int N>
  __device__ __forceinline__ void add(const float (&x)[N], float top, float scale) {
    move(fmaxf(high, top), scale);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const float a = exponent_of(x[l], high, scale), e = exp2_fast(a);
      z += e;
      // A NaN would lose to the floor, but e has it too.
      if constexpr (ENTROPY) this->weighted = fmaf(e, floored(a), this->weighted);
      if constexpr (STATS) this->squares = fmaf(e, e, this->squares);
    }
  }

  // Over groups of LANES lanes, alike in all of them: one maximum first, so that the sums shrink once.
  template <int LANES>
  __device__ __forceinline__ void merge(float scale) {
    float top = high;
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, mask));
    move(top, scale);
    const auto sum = [](float& value) {
#pragma unroll
      for (int mask = LANES / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
    };
    sum(z);
    if constexpr (ENTROPY) sum(this->weighted);
    if constexpr (STATS) {
      sum(this->squares);
      sum(this->mean);
    }
  }

  // Over the block. Between two calls there is a barrier.
  __device__ __forceinline__ void merge_block(const Team& team, float scale) {
    constexpr int most = kTokenThreads / 32;
    const int lane = team.thread % 32, warps = team.threads / 32;
    TokenSums* const of_warps = reinterpret_cast<TokenSums*>(team.scratch);
    merge<32>(scale);
    if (warps == 1) return;
    if (lane == 0) of_warps[team.thread / 32] = *this;
    team.sync();
    *this = lane % most < warps ? of_warps[lane % most] : TokenSums();
    merge<most>(scale);
  }
};

// The largest of vectors of logits, two at a time where they are 16 bits; a NaN loses.
template <class X, int N>
__device__ __forceinline__ float largest(const uint4 (&raw)[N]) {
  if constexpr (sizeof(X) == 4) {
    float top = -FLT_MAX;
#pragma unroll
    for (int j = 0; j < N; ++j)
      for (const uint32_t word : {raw[j].x, raw[j].y, raw[j].z, raw[j].w}) top = fmaxf(top, __uint_as_float(word));
    return top;
  } else {
    using Pair = std::conditional_t<__is_same(X, __nv_bfloat16), __nv_bfloat162, __half2>;
    Pair top, other;
    memcpy(&top, &raw[0].x, 4);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      for (const uint32_t word : {raw[j].x, raw[j].y, raw[j].z, raw[j].w}) {
        memcpy(&other, &word, 4);
        top = __hmax2(top, other);
      }
    }
    return fmaxf(to_float(top.x), to_float(top.y));
  }
}

// A row of logits, its ids, and how a block goes over them.
template <class X>
struct TokenRow {
  static constexpr int kL = kLanes<X>;

  const TokenArgs& args;
  Team team;
  int64_t row;
  const X* s;
  Grid<X> grid;
  const int64_t* ids;
  float cap, unit, scale;  // unit: 1 / T; scale: log2(e) / T

  __device__ __forceinline__ TokenRow(const TokenArgs& args, char* scratch, const void* on_grid)
      : args(args),
        team(scratch, 1),
        row(blockIdx.x),
        s(row_pointer<const X>(args.logits, row, args.length)),
        grid(on_grid != nullptr ? on_grid : s),
        ids(args.ids + row * args.entries),
        cap(float(args.softcap)) {
    unit = 1.0f / (args.temperature_rows.data == nullptr
                       ? float(args.temperature)
                       : static_cast<const float*>(args.temperature_rows.data)[row * args.temperature_rows.stride]);
    scale = unit * kLog2e;
  }

  __device__ __forceinline__ bool used(int64_t id) const { return id != -1 && id != args.ignore_index; }
  __device__ __forceinline__ bool known(int64_t id) const { return used(id) && id >= 0 && id < args.columns; }
  __device__ __forceinline__ float capped(float x) const { return cap != 0 ? cap * tanhf(x / cap) : x; }
  __device__ __forceinline__ float picked(int64_t id) const { return capped(to_float(s[id])); }

  // Calls visit(v, top, x, whole) for vectors v, v + threads, .. from an even eighth on; their logits stand side by
  // side in x, -inf past the ends of the row. whole: all of the vectors lie in the row; they come in batches. The few
  // vectors that fill no batch come one by one, so that the loop over batches counts an address and no more.
  template <int BATCH, class Visit>
  __device__ __forceinline__ void sweep(int from, int to, Visit visit) const {
    const int columns = int(args.columns), step = team.threads * BATCH;
    // Warps begin at 128 bytes. None lie in the row where that lies on another grid.
    const int first = from < (grid.skew + kL - 1) / kL ? from + 8 : from, last = min((columns + grid.skew) / kL, to);
    const int batches = grid.has(s) ? max(0, (last - first) / step) : 0, behind = batches > 0 ? first : to;
#pragma unroll 1
    for (int i = from + team.thread; i < to - batches * step; i += team.threads) {
      const int v = i < behind ? i : i + batches * step;
      const uint4 raw[1] = {grid.load(s, v, columns)};
      visit_logits(v, raw, visit, false);
    }
    const uint4* at = reinterpret_cast<const uint4*>(s + grid.first(first + team.thread));
#pragma unroll 1
    for (int v = first + team.thread, end = v + batches * step; v < end; v += step, at += step) {
      uint4 raw[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j) raw[j] = at[j * team.threads];
      visit_logits(v, raw, visit, true);
    }
  }

 private:
  template <int BATCH, class Visit>
  __device__ __forceinline__ void visit_logits(int v, const uint4 (&raw)[BATCH], Visit visit, bool whole) const {
    float top = largest<X>(raw), x[BATCH * kL];
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      float some[kL];
      unpack<X>(raw[j], some);
#pragma unroll
      for (int l = 0; l < kL; ++l) x[j * kL + l] = some[l];
    }
    if (cap != 0) {
      top = capped(top);  // which is monotone
#pragma unroll
      for (int i = 0; i < BATCH * kL; ++i) {
        const int column = grid.first(v + i / kL * team.threads) + i % kL;
        x[i] = whole || (column >= 0 && column < int(args.columns)) ? capped(x[i]) : -INFINITY;
      }
    }
    visit(v, top, x, whole);
  }
};

template <class X, bool ENTROPY, bool STATS, bool TAIL>
struct TokenForward {
  static constexpr int kL = kLanes<X>, kBatch = kTokenBatch;
  using Sums = TokenSums<ENTROPY, STATS>;

  TokenRow<X> r;
  uint32_t* marks;

  __device__ __forceinline__ float* floats(void* data) const { return static_cast<float*>(data); }

  __device__ __forceinline__ void write_row(float lse, float top, float z, float entropy, float tail) const {
    const TokenArgs& args = r.args;
    floats(args.lse)[r.row] = lse;
    floats(args.norm)[2 * r.row] = top;
    floats(args.norm)[2 * r.row + 1] = z;
    if (ENTROPY) floats(args.entropy)[r.row] = entropy;
    if (TAIL) floats(args.tail)[r.row] = tail;
  }

  // Marks the ids among the vectors from here on.
  __device__ __forceinline__ void mark(int from, int vectors) const {
    const int first = r.grid.first(from), count = vectors * kL;
    r.team.sync();
    for (int i = r.team.thread; i * 32 < count; i += r.team.threads) marks[i] = 0;
    r.team.sync();
    for (int j = r.team.thread; j < int(r.args.entries); j += r.team.threads) {
      const int64_t id = r.ids[j];
      if (!r.known(id)) continue;
      const int at = int(id) - first;
      if (at >= 0 && at < count) atomicOr(&marks[at / 32], 1u << at % 32);
    }
    r.team.sync();
  }

  // Takes the logits of vectors into the sums, those aside that are marked.
  struct Add {
    const TokenForward& row;
    Sums& sums;
    int from, to;

    template <int N>
    __device__ __forceinline__ void operator()(int v, float top, float (&x)[N], bool whole) const {
      const TokenRow<X>& r = row.r;
      const int threads = r.team.threads, columns = int(r.args.columns);
      if constexpr (TAIL) {
#pragma unroll
        for (int j = 0; j < N / kL; ++j) {
          const int bit = (v + j * threads - from) * kL;
          const uint32_t dead = row.marks[bit / 32] >> (bit % 32) & ((1u << kL) - 1);
          if (dead != 0) {
#pragma unroll
            for (int l = 0; l < kL; ++l)
              if (dead >> l & 1) x[j * kL + l] = -INFINITY;
          }
        }
      }
      if constexpr (TAIL) {
        top = x[0];
#pragma unroll
        for (int i = 1; i < N; ++i) top = fmaxf(top, x[i]);
      }
      sums.add(x, top, r.scale);
      if constexpr (STATS) {
        const float each = 1.0f / float(columns);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const int column = r.grid.first(v + i / kL * threads) + i % kL;
          if (whole || (column >= 0 && column < columns)) sums.mean = fmaf(x[i], each, sums.mean);
        }
      }
    }
  };

  __device__ __forceinline__ Sums sum() const {
    Sums sums;
    const int vectors = r.grid.vectors(int(r.args.columns));
    // A part is as wide as the marks.
    constexpr int part = TAIL ? kTokenMarks * 32 / kL : int(kMaxTokenColumns);
#pragma unroll 1
    for (int from = 0; from < vectors; from += part) {
      const int to = min(vectors, from + part);
      if (TAIL) mark(from, to - from);
      r.template sweep<kBatch>(from, to, Add{*this, sums, from, to});
      if (!TAIL) break;
    }
    sums.merge_block(r.team, r.scale);
    return sums;
  }

  __device__ __forceinline__ void run() const {
    const TokenArgs& args = r.args;
    const int slots = int(args.entries);
    float* const logprobs = floats(args.logprobs) + r.row * slots;
    float* const stats = STATS ? floats(args.stats) + r.row * (slots + 2) : nullptr;
    bool any = false;
    for (int j = r.team.thread; j < slots; j += r.team.threads) any = any || r.used(r.ids[j]);
    if (!__syncthreads_or(any)) {
      for (int j = r.team.thread; j < slots; j += r.team.threads) logprobs[j] = 0;
      if (STATS)
        for (int j = r.team.thread; j < slots + 2; j += r.team.threads) stats[j] = 0;
      if (r.team.thread == 0) write_row(0, 0, 0, 0, 0);
      return;
    }
    const Sums sums = sum();
    float top = sums.high, z = sums.z, outside = 0;
    if constexpr (TAIL) {
      // The ids of a row, no two of which are equal, beside all others.
      float inside = -FLT_MAX;
      for (int j = r.team.thread; j < slots; j += r.team.threads)
        if (r.known(r.ids[j])) inside = fmaxf(inside, r.picked(r.ids[j]));
      Sums of_ids;
      for (int j = r.team.thread; j < slots; j += r.team.threads)
        if (r.known(r.ids[j])) of_ids.z += exp2_fast(exponent_of(r.picked(r.ids[j]), inside, r.scale));
      of_ids.high = inside;
      r.team.sync();
      of_ids.merge_block(r.team, r.scale);
      outside = sums.z;
      top = fmaxf(top, of_ids.high);
      z = of_ids.z * exp2_fast(exponent_of(of_ids.high, top, r.scale)) +
          outside * exp2_fast(exponent_of(sums.high, top, r.scale));
    }
    const float sum_of_all = z;
    if (z == 0) z = NAN;  // nothing in the row is finite
    const float log_z = logf(z);
    for (int j = r.team.thread; j < slots; j += r.team.threads) {
      const int64_t id = r.ids[j];
      const bool known = r.known(id);
      const float x = known ? r.picked(id) : NAN;
      logprobs[j] = r.used(id) ? (x - top) * r.unit - log_z : 0.0f;
      if (STATS) stats[2 + j] = known && z > 0 && x == top ? 1.0f : 0.0f;
    }
    if (r.team.thread == 0) {
      float entropy = 0;
      if constexpr (ENTROPY) entropy = log_z - sums.weighted / z * float(kLn2);
      float tail = (sums.high - top) * r.unit + (logf(outside) - log_z);
      if (outside == 0 && z > 0) tail = -INFINITY;
      write_row(top * r.unit + log_z, top, sum_of_all, entropy, tail > 0 ? 0.0f : tail);
      if constexpr (STATS) {
        const float squares = logf(sums.squares) - 2 * log_z;
        stats[0] = squares > 0 ? 0.0f : squares;
        stats[1] = sums.mean + 0 * log_z;  // NaN where there is no distribution
      }
    }
  }
};

template <class X, bool ENTROPY, bool STATS, bool TAIL>
__global__ void __launch_bounds__(kTokenThreads, STATS || TAIL ? 3 : 4)
    token_fwd_kernel(const __grid_constant__ TokenArgs args) {
  __shared__ __align__(16) char scratch[kScratchBytes];
  extern __shared__ uint4 token_memory[];
  TokenForward<X, ENTROPY, STATS, TAIL>{TokenRow<X>(args, scratch, nullptr), reinterpret_cast<uint32_t*>(token_memory)}
      .run();
}

// The gradient of a row: the part that is proportional to q.
template <class X, bool ENTROPY>
struct TokenGradient {
  static constexpr int kL = kLanes<X>;

  X* g;
  Grid<X> grid;
  int columns, width, threads, last;  // last: the vector in which the columns end
  float top, scale, slope, bend, inverse_cap;

  __device__ __forceinline__ float part(float x) const {
    const float a = exponent_of(x, top, scale), e = exp2_fast(a);
    return ENTROPY ? e * fmaf(floored(a), bend, slope) : e * slope;
  }
  __device__ __forceinline__ float through_cap(float d, float x) const {
    const float ratio = x * inverse_cap;
    return inverse_cap != 0 ? d * (1 - ratio * ratio) : d;
  }

  template <int N>
  __device__ __forceinline__ void operator()(int v, float, float (&x)[N], bool whole) const {
    if (inverse_cap != 0) {
#pragma unroll
      for (float& value : x) value = through_cap(part(value), value);
    } else {
#pragma unroll
      for (float& value : x) value = part(value);
    }
    X* const at = g + grid.first(v);
#pragma unroll
    for (int j = 0; j < N / kL; ++j) {
      float d[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) d[l] = x[j * kL + l];
      if (whole) {
        store_global(at + j * (threads * kL), pack<X>(d));
        continue;
      }
      if (v == last) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          if (grid.first(v) + l >= columns) d[l] = 0;
      }
      grid.store(g, v, width, d);
    }
  }
};

template <class X, bool ENTROPY>
__global__ void __launch_bounds__(kTokenThreads, 4) token_bwd_kernel(const __grid_constant__ TokenArgs args) {
  constexpr int L = kLanes<X>;
  extern __shared__ uint4 token_memory[];
  const int slots = int(args.entries), columns = int(args.columns), width = int(args.width);
  X* const g = row_pointer<X>(args.dlogits, blockIdx.x, args.length);
  // Where the two lie on different grids the stores are the wide ones.
  const TokenRow<X> r(args, nullptr, g);
  const Team& team = r.team;
  const Grid<X>& grid = r.grid;
  // The slots of the row: the columns, -1 where there is none, their upstream gradients and their logits.
  int* const ids = reinterpret_cast<int*>(token_memory);
  float* const given = reinterpret_cast<float*>(ids + slots);
  float* const picked = given + slots;

  float h = 0, sum = 0;
  bool any = false, some = false;
  for (int j = team.thread; j < slots; j += team.threads) {
    const int64_t id = r.ids[j];
    const bool used = r.used(id), known = r.known(id);
    const float upstream = used ? static_cast<const float*>(args.dlogprobs)[r.row * slots + j] : 0.0f;
    some = some || used;
    any = any || upstream != 0;
    ids[j] = known ? int(id) : used && id != kElsewhere ? -2 : -1;
    given[j] = upstream;
  }
  if (ENTROPY) {
    h = static_cast<const float*>(args.dentropy)[r.row];
    any = any || (some && h != 0);
  }
  if (!__syncthreads_or(any)) {
    const float zero[L] = {};
    for (int v = team.thread; v < grid.vectors(width); v += team.threads) grid.store(g, v, width, zero);
    return;
  }
  // Every thread sums the upstream gradients in their order.
  for (int j = 0; j < slots; ++j) sum += ids[j] == -2 ? NAN : given[j];
  for (int j = team.thread; j < slots; j += team.threads)
    if (ids[j] >= 0) picked[j] = r.picked(ids[j]);
  const float top = static_cast<const float*>(args.norm)[2 * r.row];
  const float z = static_cast<const float*>(args.norm)[2 * r.row + 1], scale = r.scale;
  // log q + H is a ln 2 less its mean: a in powers of two, and H - log z of the mean.
  if (ENTROPY) sum += h * (static_cast<const float*>(args.entropy)[r.row] - logf(z));
  const int vectors = grid.vectors(columns);
  const TokenGradient<X, ENTROPY> gradient{g,
                                           grid,
                                           columns,
                                           width,
                                           team.threads,
                                           vectors - 1,
                                           top,
                                           scale,
                                           -sum * r.unit / z,
                                           ENTROPY ? -h * float(kLn2) * r.unit / z : 0.0f,
                                           r.cap != 0 ? 1 / r.cap : 0.0f};
  team.sync();  // the stores from here on may go to the logits

  r.template sweep<kTokenBatch>(0, vectors, gradient);
  const float zero[L] = {};
  for (int v = vectors + team.thread; v < grid.vectors(width); v += team.threads) grid.store(g, v, width, zero);
  team.sync();
  // Over what the sweep wrote there; of equal ids the first slot writes.
  for (int j = team.thread; j < slots; j += team.threads) {
    const int id = ids[j];
    float total = 0;
    bool first = id >= 0;
    for (int i = 0; i < slots && first; ++i) {
      if (ids[i] != id) continue;
      first = i >= j;
      total += given[i];
    }
    if (first) g[id] = from_float<X>(gradient.through_cap(fmaf(total, r.unit, gradient.part(picked[j])), picked[j]));
  }
}

}  // namespace cuda
}  // namespace kdk
