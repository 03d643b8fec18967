// A row of logits of the sparse top-k kernels without its entries, and the sweeps over it.
#pragma once

#include "topk_sums.cuh"

namespace kdk {
namespace cuda {

// The logits of a row as a block sees them: its share of the vectors, in shared memory where the row is resident, and
// what is no outcome outside the entries, which is entries, and what lies past the ends of the row: marked, or -inf in
// shared memory where nobody has to tell it from a logit.
template <class X>
struct Logits {
  static constexpr int kL = kLanes<X>;

  const X* row;
  Grid<X> grid;
  int columns, begin, end;  // vectors
  float cap;
  uint4* resident;  // null: the row is read from global memory by every sweep
  uint32_t* marks;
  int capacity;     // vectors that the marks cover
  bool marks_all;   // false: entries are -inf in shared memory
  int marked = -1;  // the segment that the marks are of

  // Begins to copy the share; complete after copies_done.
  __device__ __forceinline__ void fetch(const Team& team) const {
    const WholeVectors<X, const X> whole(grid, row, columns);
    uint32_t to = shared_address(resident + team.thread);
    const X* from = whole.at(begin + team.thread);
#pragma unroll 4
    for (int v = begin + team.thread; v < end; v += team.threads) {
      if (whole.has(v)) {
        copy_async(to, from);
      } else {
        resident[v - begin] = load_edge(row, grid.first(v), columns, -INFINITY);
      }
      to += 16 * team.threads, from += kL * team.threads;
    }
  }

  // Between barriers, of a share that has come.
  __device__ __forceinline__ void leave_out(const Team& team, const Entries& entries) const {
    X* const first = reinterpret_cast<X*>(resident) - grid.first(begin);
    for (int j = team.thread; j < entries.slots; j += team.threads) {
      const int id = entries.ids[j], v = grid.vector_of(id);
      if (id >= 0 && v >= begin && v < end) first[id] = from_float<X>(-INFINITY);
    }
  }

  __device__ __forceinline__ void mark(const Team& team, const Entries& entries, int segment) {
    if (segment == marked) return;
    marked = segment;
    const int from = begin + segment * capacity, vectors = min(capacity, end - from);
    const int first = grid.first(from), last = first + vectors * kL;
    const auto set = [&](int element) { atomicOr(&marks[(element - first) / 32], 1u << (element - first) % 32); };
    team.sync();
    for (int i = team.thread; i * 32 < vectors * kL; i += team.threads) marks[i] = 0;
    team.sync();
    for (int j = team.thread; j < entries.slots; j += team.threads)
      if (entries.ids[j] >= max(first, 0) && entries.ids[j] < last) set(entries.ids[j]);
    for (int e = first + team.thread; e < 0; e += team.threads) set(e);
    for (int e = max(columns, first) + team.thread; e < last; e += team.threads) set(e);
    team.sync();
  }

  // -inf where there is a mark.
  static __device__ __forceinline__ uint4 without(const uint4& raw, uint32_t dead) {
    float x[kL];
    unpack<X>(raw, x);
#pragma unroll
    for (int l = 0; l < kL; ++l)
      if (dead >> l & 1) x[l] = -INFINITY;
    return pack<X>(x);
  }

  // Calls prepare(raw) for some vectors of the share at once, by whole warps, then visit(v, x, marks) for each; marked
  // logits are -inf.
  // MARKS: marks_all. BATCH: a thread's loads in flight, and copies of the code of visit.
  template <int BATCH, bool MARKS, class Prepare, class Visit>
  __device__ __forceinline__ void sweep(const Team& team, const Entries& entries, bool backwards, Prepare prepare,
                                        Visit visit) {
    const int segments = MARKS ? (end - begin + capacity - 1) / capacity : 1;
    for (int k = 0; k < segments; ++k) {
      const int segment = backwards ? segments - 1 - k : k;
      if (MARKS) mark(team, entries, segment);
      const int from = begin + segment * capacity, to = MARKS ? min(from + capacity, end) : end;
      const int step = team.threads * BATCH, whole = (to - from) / step, first = from + team.thread;
      // The vectors that fill no batch are the last ones.
      const auto rest = [&] {
        if (from + whole * step < to) batch<BATCH, MARKS, false>(team, from, first + whole * step, to, prepare, visit);
      };
      if (backwards) rest();
#pragma unroll 1
      for (int i = 0; i < whole; ++i)
        batch<BATCH, MARKS, true>(team, from, first + (backwards ? whole - 1 - i : i) * step, to, prepare, visit);
      if (!backwards) rest();
    }
  }
  // WHOLE: all of its vectors are before the last one.
  template <int BATCH, bool MARKS, bool WHOLE, class Prepare, class Visit>
  __device__ __forceinline__ void batch(const Team& team, int from, int first, int to, Prepare& prepare,
                                        Visit& visit) const {
    uint4 raw[BATCH];
    uint32_t dead[BATCH];
    const WholeVectors<X, const X> whole(grid, row, columns);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      // In shared memory the last one stands for those after it, until they are visited.
      const int v = WHOLE ? first + j * team.threads : min(first + j * team.threads, to - 1);
      if (!MARKS || resident != nullptr) {
        raw[j] = load_shared(shared_address(resident) + 16 * (v - begin));
      } else if (!WHOLE && first + j * team.threads >= to) {
        raw[j] = lowest<X>();
      } else {
        raw[j] = whole.has(v) ? *reinterpret_cast<const uint4*>(whole.at(v))
                              : load_edge(row, grid.first(v), columns, -INFINITY);
      }
      dead[j] = 0;
      if (!MARKS) continue;
      const int bit = (v - from) * kL;
      dead[j] = marks[bit / 32] >> (bit % 32) & ((1u << kL) - 1);
      if (dead[j] != 0) {
        asm volatile("" ::: "memory");  // a branch, for it is seldom taken
        raw[j] = without(raw[j], dead[j]);
      }
    }
    prepare(raw);
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const int v = first + j * team.threads;
      if (!WHOLE && v >= to) break;
      float x[kL];
      unpack<X>(raw[j], x);
      if (MARKS && cap != 0) {
#pragma unroll
        for (int l = 0; l < kL; ++l) x[l] = dead[j] >> l & 1 ? -INFINITY : cap * tanhf(x[l] / cap);
      }
      visit(v, x, dead[j]);
    }
  }
};
// For sweep: nothing has to be known of several vectors.
struct Unprepared {
  template <class Raw>
  __device__ __forceinline__ void operator()(const Raw&) const {}
};

template <class X>
__device__ __forceinline__ void fill_zero(const Team& team, X* row, const Grid<X>& grid, int begin, int end,
                                          int width) {
  float zero[kLanes<X>] = {};
  for (int v = begin + team.block * team.threads + team.thread; v < end; v += team.blocks * team.threads)
    grid.store(row, v, width, zero);
}

}  // namespace cuda
}  // namespace kdk
