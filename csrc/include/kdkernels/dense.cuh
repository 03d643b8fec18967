// The dense pattern on CUDA: loss and gradient of a row from one read of student and teacher, 2R + 1W, where they fit
// into the shared memory of a block or of a cluster of blocks.
//
// The blocks stay: a cluster takes one row after the other, and while it works on one, the next one's logits come into
// the other stage of shared memory, by bulk copies that one thread starts, or by copies of each thread's own where rows
// do not lie on 16 bytes. A thread always has the same vectors of a stage. Sums over the cluster take one trip: each
// warp stores its part into the shared memory of every block, where a barrier counts the bytes; nothing is fenced at
// the scope of the GPU. The gradient goes into the student's place in shared memory and leaves from there.
//
// Two kernels: one keeps the exponentials of its columns in registers for the gradient; the swept one computes them
// again, of rows too wide for that, or with the less usual parts of the objective, and where a row fits no shared
// memory it reads global memory again.
//
// As in kdkernels/kernels/dense_cluster.py everything is relative to the row's two maxima, and a maximum is subtracted
// before anything is multiplied: the largest exponential is then exactly 1. ds and dt are logits less their maxima, es
// and et exponentials, unit_s and unit_t 1 / temperature.
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

struct alignas(16) Tops {
  int s = INT32_MIN, t = INT32_MIN, pad[2] = {};
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

// The numbers of a row that are known before it is read.
struct RowScales {
  float weight, kd, unit_s, unit_t, scale_s, scale_t, ratio;  // ratio: T_t / T, exactly 1 where they are equal
  float param, rest;                                          // rest: 1 - param

  __device__ __forceinline__ void set(const DenseLaunch& launch, float row_weight, float temperature,
                                      float teacher_temperature, float x0, float others) {
    weight = launch.scale * row_weight;
    kd = weight * launch.kd_weight * (launch.args.scale_by_t_squared ? temperature * temperature : 1.0f);
    unit_s = reciprocal(temperature), unit_t = reciprocal(teacher_temperature);
    ratio = temperature == teacher_temperature ? 1.0f : teacher_temperature * unit_s;
    scale_s = kLog2e * unit_s, scale_t = kLog2e * unit_t;
    param = x0, rest = others;
  }
  __device__ __forceinline__ explicit RowScales(const DenseLaunch& launch) {
    set(launch, 1, launch.temperature, launch.teacher_temperature, launch.param0, launch.rest);
  }
  static __device__ __forceinline__ float value_of(const PerRow& values, int64_t row, float otherwise) {
    return values.data == nullptr ? otherwise : static_cast<const float*>(values.data)[row * values.stride];
  }
  __device__ __forceinline__ void of_row(const DenseLaunch& launch, int64_t row) {
    const DenseArgs& args = launch.args;
    const float x0 = value_of(args.param, row, launch.param0);
    set(launch, value_of(args.row_weight, row, 1), value_of(args.student_temperature, row, launch.temperature),
        value_of(args.teacher_temperature, row, launch.teacher_temperature), x0,
        args.param.data == nullptr ? launch.rest : 1 - x0);
  }
};

// The vectors of a share that one access moves.
struct Whole {
  int from = 0, to = 0;
  __device__ __forceinline__ bool has(int i) const { return unsigned(i - from) < unsigned(to - from); }
};

// A row's tensors, and the vectors of it that this block has.
template <class X>
struct Place {
  static constexpr int kL = kLanes<X>;

  const X *s, *t;
  X* g;
  Grid<X> grid{nullptr};
  int begin, count;

  template <class P>
  static __device__ __forceinline__ P* at(const DenseLaunch& launch, const LogitsView& view, int row) {
    P* const data = static_cast<P*>(view.data);
    if (launch.plan.flat) return data + row * view.stride_l;
    const unsigned length = unsigned(launch.args.length);
    return data + int64_t(unsigned(row) / length) * view.stride_b + int64_t(unsigned(row) % length) * view.stride_l;
  }
  __device__ __forceinline__ Place(const DenseLaunch& launch, int block, int row)
      : s(at<const X>(launch, launch.args.student, row)),
        t(at<const X>(launch, launch.args.teachers[0], row)),
        g(launch.args.wants_grad ? at<X>(launch, launch.args.dstudent, row) : nullptr),
        grid(launch.plan.aligned ? nullptr : s) {
    begin = block * launch.plan.share;
    count = max(0, min(grid.vectors(int(launch.args.columns)) - begin, launch.plan.share));
  }
  // The element that vector i begins with.
  __device__ __forceinline__ int first(int i) const { return grid.first(begin + i); }
  __device__ __forceinline__ Whole whole(const void* row, int elements) const {
    if (!grid.has(row)) return {};
    const int from = (grid.skew + kL - 1) / kL - begin;
    return {from, max(from, min((elements + grid.skew) / kL - begin, count))};
  }
};

// True if the cross entropy is asked for: by its weight, or by statistics where there are labels.
__device__ __forceinline__ bool values_ce(const DenseLaunch& launch) {
  return launch.ce_weight != 0 || (launch.args.stats != nullptr && launch.args.labels != nullptr);
}

// The common part of the kernels: rows, stages, labels.
template <class X>
struct DenseRows {
  static constexpr int kL = kLanes<X>;

  const DenseLaunch& launch;
  const DenseArgs& args;
  Cluster& team;
  const uint32_t stages;                               // address in shared memory
  const bool bulk, aligned, reads_teacher, all_slots;  // all_slots: a stage's vectors past the row's are kFar
  const int columns, capacity, rows, step;
  int stage = 0, uses = 0;  // uses of all stages
  int row, next;
  float next_picked = NAN;
  Place<X> place;  // of bulk copies the pointers are those of the first row
  Whole whole_g;

  __device__ __forceinline__ DenseRows(const DenseLaunch& launch, Cluster& team, char* shared, bool reads_teacher,
                                       bool all_slots)
      : launch(launch),
        args(launch.args),
        team(team),
        stages(shared_address(shared) + launch.plan.row_at),
        bulk(launch.plan.source == Source::kBulk),
        aligned(launch.plan.aligned),
        reads_teacher(reads_teacher),
        all_slots(all_slots),
        columns(int(args.columns)),
        capacity(launch.plan.capacity),
        rows(int(launch.rows)),
        step(int(gridDim.x / unsigned(team.blocks))),
        row(int(blockIdx.x / unsigned(team.blocks))),
        place(launch, team.block, row) {}

  // Addresses in shared memory.
  __device__ __forceinline__ uint32_t student(int which) const { return stages + which * 2 * capacity * 16; }
  __device__ __forceinline__ uint32_t teacher(int which) const { return student(which) + capacity * 16; }

  // The first row from here on whose label is not ignored; zeros for those before it.
  __device__ __forceinline__ int counted(int from) const {
    if (args.labels == nullptr) return from;
    while (from < rows && args.labels[from] == args.ignore_index) {
      leave_out(from);
      from += step;
    }
    return from;
  }
  __device__ __forceinline__ void leave_out(int ignored) const {
    if (args.wants_grad) zeros(ignored, 0);
    if (team.leads()) {
      static_cast<float*>(args.loss)[ignored] = 0;
      for (int k = 0; args.stats != nullptr && k < kStats; ++k)
        static_cast<float*>(args.stats)[int64_t(ignored) * kStats + k] = 0;
    }
  }
  // Zeros in a row's gradient, from the vector after this column on.
  __device__ __forceinline__ void zeros(int wanted, int column) const {
    const Place<X> there(launch, team.block, wanted);
    const int first = column == 0 ? 0 : there.grid.vectors(column), last = there.grid.vectors(int(args.width));
    float zero[kL] = {};
    for (int v = first + team.block * team.threads + team.thread; v < last; v += team.blocks * team.threads)
      there.grid.store(there.g, v, int(args.width), zero);
  }

  // Begins to fetch a row; its label's logit too, which another block may have.
  __device__ __forceinline__ void fetch(int wanted, int which) {
    if (wanted >= rows) return;
    if (values_ce(launch)) {
      const int64_t label = args.labels[wanted];
      next_picked = label >= 0 && label < columns
                        ? to_float(Place<X>::template at<const X>(launch, args.student, wanted)[label])
                        : NAN;
    }
    if (bulk) {
      if (team.thread != 0) return;
      const uint32_t bytes = uint32_t(place.count) * 16, barrier = team.full(which);
      barrier_expect(barrier, reads_teacher ? 2 * bytes : bytes);
      if (bytes == 0) return;
      const X* const s = Place<X>::template at<const X>(launch, args.student, wanted);
      const X* const t = Place<X>::template at<const X>(launch, args.teachers[0], wanted);
      bulk_load(student(which), s + place.begin * kL, bytes, barrier);
      if (reads_teacher) bulk_load(teacher(which), t + place.begin * kL, bytes, barrier);
    } else if (launch.plan.source == Source::kCopies) {
      const Place<X> there(launch, team.block, wanted);
      copy(there, there.s, student(which));
      if (reads_teacher) copy(there, there.t, teacher(which));
    }
  }
  __device__ __forceinline__ void copy(const Place<X>& there, const X* from, uint32_t to) const {
    const Whole whole = there.whole(from, columns);
    const int begin = first_slot(), step = slot_step();
    const int end = !all_slots ? there.count : aligned ? min(there.count, end_of_slots()) : end_of_slots();
    const X* vector = from + there.first(begin);
    to += 16 * begin;
#pragma unroll 4
    for (int i = begin; i < end; i += step, to += 16 * step, vector += kL * step)
      copy_vector(there, whole, from, vector, i, to);
  }
  // The vectors of a stage that are the thread's: where all slots count, a run of pieces for each warp, else every
  // threads-th one.
  __device__ __forceinline__ int first_slot() const {
    return all_slots ? team.warp * launch.plan.pieces * 32 + team.thread % 32 : team.thread;
  }
  __device__ __forceinline__ int slot_step() const { return all_slots ? 32 : team.threads; }
  __device__ __forceinline__ int end_of_slots() const { return (team.warp + 1) * launch.plan.pieces * 32; }
  __device__ __forceinline__ void copy_vector(const Place<X>& there, const Whole& whole, const X* from, const X* vector,
                                              int i, uint32_t to) const {
    if (whole.has(i)) {
      copy_async(to, vector);
    } else {
      store_shared(to, i < there.count ? load_edge(from, there.first(i), columns, all_slots ? kFar<X> : -INFINITY)
                                       : far_vector<X>());
    }
  }
  __device__ __forceinline__ void wait() const {
    if (bulk) {
      barrier_wait<false>(team.full(stage), unsigned(uses / launch.plan.stages) & 1);
    } else {
      copies_done();
    }
  }
  // A block's vectors past the row's, once where no copy writes them.
  __device__ __forceinline__ void pad() const {
    if (!aligned || !all_slots) return;
    for (int which = 0; which < launch.plan.stages; ++which) {
      for (int i = first_slot(); i < end_of_slots(); i += slot_step()) {
        if (i < place.count) continue;
        store_shared(student(which) + 16 * i, far_vector<X>());
        store_shared(teacher(which) + 16 * i, far_vector<X>());
      }
    }
  }

  // Begins the next row's copies, where there is another stage. Every thread of the block has to be past the row
  // before: it is once a reduction of this one is done.
  __device__ __forceinline__ void fetch_next() {
    if (launch.plan.stages == 1) return;
    if (bulk && args.wants_grad && team.thread == 0) bulk_stores_have_read();
    fetch(next, stage ^ 1);
  }

  // Every row that counts as a Row; its run() calls fetch_next.
  template <class Row>
  __device__ __forceinline__ void run() {
    team.begin(bulk);
    pad();
    const bool per_row = args.student_temperature.data != nullptr || args.teacher_temperature.data != nullptr ||
                         args.param.data != nullptr || args.row_weight.data != nullptr;
    const bool doubled = launch.plan.stages == 2, writes = args.wants_grad, padded = writes && args.width > columns;
    RowScales scales(launch);
    row = counted(row);
    fetch(row, 0);
#pragma unroll 1
    while (row < rows) {
      next = counted(row + step);
      if (per_row) scales.of_row(launch, row);
      if (!bulk) {
        place = Place<X>(launch, team.block, row);
        if (writes) whole_g = place.whole(place.g, int(args.width));
      }
      const float picked = next_picked;
      wait();
      Row(*this, team, scales, picked).run();
      if (padded) zeros(row, columns);
      if (bulk) {
        publish_to_bulk_copies();
        __syncthreads();
        if (writes && team.thread == 0 && place.count > 0)
          bulk_store(Place<X>::template at<X>(launch, args.dstudent, row) + place.begin * kL, student(stage),
                     uint32_t(place.count) * 16);
      }
      if (!doubled) {
        if (bulk && writes && team.thread == 0) bulk_stores_have_read();
        fetch(next, stage);
      }
      row = next;
      ++uses;
      if (doubled) stage ^= 1;
    }
    if (bulk && team.thread == 0) bulk_stores_done();
  }

  // Vector i of the block's share of the gradient; at: the student's in shared memory.
  __device__ __forceinline__ void put(int i, uint32_t at, const float (&x)[kL]) const {
    const uint4 raw = pack<X>(x);
    if (bulk) {
      store_shared(at, raw);
    } else if (whole_g.has(i)) {
      store_global(place.g + place.first(i), raw);
    } else {
      store_edge(place.g, place.first(i), int(args.width), raw);
    }
  }
};

// Cross entropy and z-loss of a row, and their part of the gradient: factor e^ds - step at the label - floor.
struct HardTerms {
  float loss = 0, ce = 0, lse = 0, factor = 0, step = 0, floor = 0;

  HardTerms() = default;
  // zh: the sum of e^ds; centered: of the logits less center, which smoothed labels need.
  __device__ __forceinline__ HardTerms(const DenseLaunch& launch, float weight, float top, float zh, float picked,
                                       float centered, float center) {
    const float log_z = log_of_ratio(zh, 1.0f), smoothing = launch.label_smoothing;
    lse = top + log_z;
    const float hard = weight * launch.ce_weight;
    if (values_ce(launch)) {
      // Smoothing 1 gives the label no part, and smoothing 0 none to the mean.
      ce = log_z;
      if (smoothing != 1) ce += (1 - smoothing) * (top - picked);
      if (smoothing != 0) ce += smoothing * (top - center) - smoothing * (centered / float(launch.args.columns));
      ce = at_least_0(ce);
      if (hard != 0) loss += hard * ce;
    }
    factor = hard;
    if (launch.z_loss_weight != 0) {
      loss += weight * launch.z_loss_weight * lse * lse;
      factor += 2 * weight * launch.z_loss_weight * lse;
    }
    factor *= reciprocal_fast(zh);
    step = hard * (1 - smoothing);
    floor = hard * smoothing / float(launch.args.columns);
  }
};

// The divergences whose exponentials stay in registers, by the functor of their pair.
template <Held KIND>
struct PairOf {};
template <>
struct PairOf<Held::kJsd> {
  using F = Jsd;
};
template <>
struct PairOf<Held::kTvd> {
  using F = Tvd;
};
template <>
struct PairOf<Held::kSkewKl> {
  using F = SkewKl;
};
template <>
struct PairOf<Held::kSkewReverseKl> {
  using F = SkewReverseKl;
};
__host__ __device__ constexpr bool is_pair(Held kind) { return int(kind) >= int(Held::kJsd) && kind != Held::kNone; }

template <class X, Held KIND>
struct HeldRow {
  static constexpr int kL = kLanes<X>, kPieces = kHeldColumns / kL;
  static constexpr bool kPair = is_pair(KIND), kReverse = KIND == Held::kReverseKl, kBoth = KIND == Held::kJeffreys;

  DenseRows<X>& rows;
  const DenseLaunch& launch;
  Cluster& team;
  const Place<X>& place;
  const RowScales& k;
  const float picked;
  static constexpr int stride = 32 * 16;  // from one of the thread's vectors to the next
  const int first_slot;
  const uint32_t at_s, at_t;               // addresses of the first
  const int pieces;                        // the threads' vectors that there are
  float es[kPieces][kL], et[kPieces][kL];  // of a pair et becomes its scores, of a reverse KL x
  float top_s, top_t, total_s, total_t, a = 0, b = 0;

  __device__ __forceinline__ HeldRow(DenseRows<X>& rows, Cluster& team, const RowScales& scales, float picked)
      : rows(rows),
        launch(rows.launch),
        team(team),
        place(rows.place),
        k(scales),
        picked(picked),
        first_slot(rows.first_slot()),
        at_s(rows.student(rows.stage) + 16 * first_slot),
        at_t(at_s + 16 * rows.capacity),
        pieces(rows.launch.plan.pieces) {}

  __device__ __forceinline__ int slot(int piece) const { return first_slot + 32 * piece; }

  __device__ __forceinline__ void find_tops() {
    uint4 most_s = load_shared(at_s), most_t = load_shared(at_t);
#pragma unroll
    for (int piece = 1; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      most_s = packed_max<X>(most_s, load_shared(at_s + piece * stride));
      most_t = packed_max<X>(most_t, load_shared(at_t + piece * stride));
    }
    Tops tops;
    tops.s = order_of(largest<X>(most_s));
    tops.t = order_of(largest<X>(most_t));
    tops = team.over(tops, MaxTops());
    top_s = of_order(tops.s), top_t = of_order(tops.t);
    // A row of -inf is no distribution: all that follows is NaN.
    if (!(top_s > kFar<X>)) top_s = -INFINITY;
    if (!(top_t > kFar<X>)) top_t = -INFINITY;
  }

  // x of a linear divergence, in units of the teacher's temperature: exactly ds - dt where temperatures are equal.
  __device__ __forceinline__ float mixed(float ds, float dt) const {
    return kReverse ? fmaf(ds, k.ratio, -dt) : fmaf(ds, -k.ratio, dt);
  }

  // Without a look at the weights: 0 times an infinite logarithm makes the sums NaN, which then are made again.
  static constexpr bool kGuarded = kFar<X> == -INFINITY, kLinear = !kPair;
  static constexpr int kSums = kBoth ? 4 : kPair && KIND != Held::kSkewKl ? 2 : 3;

  template <bool GUARDED>
  static __device__ __forceinline__ float add_term(float total, float weight, float x) {
    return GUARDED ? add_product(total, weight, x) : fmaf(weight, x, total);
  }

  __device__ __forceinline__ void exponentiate() {
    Sums4 sums;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      float xs[kL], xt[kL];
      unpack<X>(load_shared(at_s + piece * stride), xs);
      unpack<X>(load_shared(at_t + piece * stride), xt);
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float ds = xs[l] - top_s, dt = xt[l] - top_t;
        const float e = exp2_fast(ds * k.scale_s), f = exp2_fast(dt * k.scale_t);
        es[piece][l] = e, et[piece][l] = f;
        sums.x[1] += f;
        if constexpr (kBoth) {
          // Terms of first order cancel one by one.
          const float excess = e - f, x = mixed(ds, dt);
          sums.x[0] += excess;
          sums.x[2] = add_term<kGuarded>(sums.x[2], excess, x);
          sums.x[3] = add_term<kGuarded>(sums.x[3], e, x);
        } else {
          sums.x[0] += e;
          if constexpr (kReverse) {
            et[piece][l] = !kGuarded || e != 0 ? mixed(ds, dt) : 0.0f;
            sums.x[2] = fmaf(e, et[piece][l], sums.x[2]);
          } else if constexpr (KIND == Held::kForwardKl) {
            sums.x[2] = add_term<kGuarded>(sums.x[2], f, mixed(ds, dt));
          } else if constexpr (KIND == Held::kSkewKl) {
            sums.x[2] = fmaf(e, f, sums.x[2]);
          }
        }
      }
    }
    sums = team.over(sums, AddSums4<kSums>());
    total_t = sums.x[1], a = sums.x[2], b = sums.x[3];
    total_s = kBoth ? sums.x[0] + total_t : sums.x[0];
    if (kBoth) excess_z = sums.x[0];
    if (kLinear && !kGuarded && (a != a || b != b)) add_terms_again();
  }

  __device__ __forceinline__ void add_terms_again() {
    Sums4 sums;
    if constexpr (kReverse) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece >= pieces) break;
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          et[piece][l] = es[piece][l] != 0 ? et[piece][l] : 0.0f;
          sums.x[0] = fmaf(es[piece][l], et[piece][l], sums.x[0]);
        }
      }
    } else {
#pragma unroll 1
      for (int piece = 0; piece < pieces; ++piece) {
        float xs[kL], xt[kL];
        unpack<X>(load_shared(at_s + piece * stride), xs);
        unpack<X>(load_shared(at_t + piece * stride), xt);
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          const float ds = xs[l] - top_s, dt = xt[l] - top_t, x = mixed(ds, dt);
          const float e = exp2_fast(ds * k.scale_s), f = exp2_fast(dt * k.scale_t);
          sums.x[0] = add_product(sums.x[0], kBoth ? e - f : f, x);
          if (kBoth) sums.x[1] = add_product(sums.x[1], e, x);
        }
      }
    }
    sums = team.over(sums, AddSums4<2>());
    a = sums.x[0], b = sums.x[1];
  }
  float excess_z = 0;

  template <class F, Score FORM>
  __device__ __forceinline__ Sums4 score_all(float factor_q) {
    const Params<float> params{k.param, 0.0f, k.rest};
    Sums4 sums;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float p = et[piece][l], q = es[piece][l] * factor_q;
        float value, score;
        F::template of_difference<FORM>(params, p, q, p - q, value, score);
        et[piece][l] = score;
        sums.x[0] += value;
        sums.x[1] += score;
      }
    }
    return sums;
  }

  // The hard terms from the row's logits in shared memory.
  __device__ __forceinline__ HardTerms hard_terms() {
    const bool own = k.scale_s != kLog2e, smooths = values_ce(launch) && launch.label_smoothing != 0;
    const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
    float zh = total_s, centered = 0;
    if (own || smooths) {
      Sums4 sums;
#pragma unroll 1
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece >= pieces) break;
        float xs[kL];
        unpack<X>(load_shared(at_s + piece * stride), xs);
        const int e = place.first(slot(piece));
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          sums.x[0] += exp2_fast((xs[l] - top_s) * kLog2e);
          const bool real = slot(piece) < place.count && e + l >= 0 && e + l < rows.columns;
          sums.x[1] += real ? xs[l] - center : 0.0f;
        }
      }
      sums = team.over(sums, AddSums4<2>());
      if (own) zh = sums.x[0];
      centered = sums.x[1];
    }
    return HardTerms(launch, k.weight, top_s, zh, picked, centered, center);
  }

  __device__ __forceinline__ void run() {
    find_tops();
    rows.fetch_next();
    exponentiate();
    const bool hard = launch.ce_weight != 0 || launch.z_loss_weight != 0;
    const float inverse_s = reciprocal_fast(total_s), inverse_t = reciprocal_fast(total_t);
    if (!kBoth) excess_z = total_s - total_t;
    excess_z *= inverse_t;
    float divergence, mean_q = 0, factor_q = 1, score_sum = 0;
    if constexpr (kPair) {
      using F = typename PairOf<KIND>::F;
      factor_q = total_t == total_s ? 1.0f : total_t * inverse_s;
      Sums4 sums;
      if constexpr (KIND == Held::kTvd) {
        sums = total_t == total_s ? score_all<F, Score::kPlain>(factor_q) : score_all<F, Score::kApart>(factor_q);
      } else if constexpr (KIND == Held::kSkewKl) {
        // Near where the rows are equal, or few tokens have most of both.
        const bool decides = total_t == total_s || (total_t < 4 && total_s < 4);
        sums = decides && a > 0.25f ? score_all<F, Score::kNear>(factor_q) : score_all<F, Score::kPlain>(factor_q);
      } else {
        sums = score_all<F, KIND == Held::kSkewReverseKl ? Score::kNear : Score::kPlain>(factor_q);
      }
      if (Paired<F>::less_score) sums.x[0] += sums.x[1];
      sums = team.over(sums, AddSums4<2>());
      divergence = sums.x[0] * inverse_t;
      score_sum = sums.x[1] * inverse_t;
    } else {
      const float log_zt_zs = team.leads() ? log_of_ratio(total_t, total_s) : 0.0f;
      if constexpr (kBoth) {
        mean_q = b * inverse_s;
        const float mean_excess = a * inverse_t;
        // An infinite logarithm makes both terms infinite; their difference has the sign of the excess.
        divergence = fabsf(mean_excess) == INFINITY ? -mean_excess : product_or_0(excess_z, mean_q) - mean_excess;
        divergence *= k.unit_t;
        mean_q = -mean_q;
      } else if constexpr (kReverse) {
        mean_q = a * inverse_s;
        divergence = mean_q * k.unit_t + log_zt_zs;
      } else {
        divergence = a * inverse_t * k.unit_t - log_zt_zs;
      }
    }
    divergence = at_least_0(divergence);
    const float loss = k.kd * divergence;
    HardTerms terms;
    if (hard) terms = hard_terms();
    if (team.leads()) static_cast<float*>(launch.args.loss)[rows.row] = loss + terms.loss;
    if (place.g != nullptr) write(terms, hard, inverse_s, inverse_t, mean_q, factor_q, score_sum);
  }
  __device__ __forceinline__ void write(const HardTerms& terms, bool hard, float inverse_s, float inverse_t,
                                        float mean_q, float factor_q, float score_sum) const {
    const float scale = k.kd * k.unit_s, of_q = scale * k.unit_t * inverse_s;
    // Exactly 1 for equal rows, so that their gradient is exactly 0.
    const float ratio_z = 1 + excess_z, pulled = factor_q * score_sum;
    const float factor = kPair ? scale * inverse_t : scale * inverse_s;
    const int64_t label = launch.args.ce_weight != 0 ? launch.args.labels[rows.row] : -1;
    const int label_vector = label >= 0 && label < rows.columns ? place.grid.vector_of(int(label)) - place.begin : -1;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (piece >= pieces) break;
      float g[kL], xs[kL], xt[kL];
      if constexpr (kBoth) {
        unpack<X>(load_shared(at_s + piece * stride), xs);
        unpack<X>(load_shared(at_t + piece * stride), xt);
      }
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        const float e = es[piece][l], f = et[piece][l];
        if constexpr (kPair) {
          g[l] = fmaf(e, -pulled, f) * factor;
        } else if constexpr (kReverse) {
          g[l] = e * ((f - mean_q) * of_q);
        } else if constexpr (kBoth) {
          // Where one outcome has all but 1e-8 of both, the ratio's excess over 1 is what there is.
          const float slope = fmaf(xs[l] - top_s, k.ratio, -(xt[l] - top_t)) - mean_q;
          g[l] = fmaf(fmaf(f, -excess_z, e - f), factor, product_or_0(e, slope * of_q));
        } else {
          g[l] = fmaf(f, -ratio_z, e) * factor;
        }
      }
      if (hard) add(terms, piece, label_vector, int(label), g);
      if (slot(piece) < place.count) rows.put(slot(piece), at_s + piece * stride, g);
    }
  }

  __device__ __forceinline__ void add(const HardTerms& terms, int piece, int label_vector, int label,
                                      float (&g)[kL]) const {
    float xs[kL];
    unpack<X>(load_shared(at_s + piece * stride), xs);
    const int first = place.first(slot(piece));
#pragma unroll
    for (int l = 0; l < kL; ++l) g[l] = fmaf(terms.factor, exp2_fast((xs[l] - top_s) * kLog2e), g[l] - terms.floor);
    if (slot(piece) == label_vector) {
#pragma unroll
      for (int l = 0; l < kL; ++l)
        if (first + l == label) g[l] -= terms.step;
    }
    if (first + kL > rows.columns) {
#pragma unroll
      for (int l = 0; l < kL; ++l)
        if (first + l >= rows.columns) g[l] = 0;
    }
  }
};

template <class X, Held KIND>
__global__ void __launch_bounds__(kDenseThreads, 1) dense_held_kernel(const __grid_constant__ DenseLaunch launch) {
  extern __shared__ uint4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  Cluster team(shared, launch.plan);
  DenseRows<X> rows(launch, team, shared, true, true);
  rows.template run<HeldRow<X, KIND>>();
}

// Of a sweep: maxima, the sums relative to them, those of a linear divergence over p and over q, that of e^ds at
// temperature 1, of the logits less the label's, and of es et.
struct alignas(16) Norms {
  float top_s = kLowest, top_t = kLowest, zs = 0, zt = 0, p = 0, q = 0, zh = 0, centered = 0, overlap = 0, pad[3] = {};
};

struct MoveNorms {
  float scale_s, scale_t, c_pp, c_pq, c_qp, c_qq;  // c_pq, c_qq: times T_t / T

  // total = sum e x to other maxima: e shrinks by factor, x grows by shift; mass is the old sum of e.
  static __device__ __forceinline__ float moved(float total, float mass, float factor, float shift) {
    const float rest = mass * factor;
    return rest == 0 ? 0.0f : fmaf(total, factor, rest * shift);
  }
  __device__ __forceinline__ void move(Norms& n, float top_s, float top_t) const {
    const float by_s = n.top_s - top_s, by_t = n.top_t - top_t;
    const float fs = exp2_fast(by_s * scale_s), ft = exp2_fast(by_t * scale_t);
    n.p = moved(n.p, n.zt, ft, combined(c_pp, by_t, c_pq, by_s));
    n.q = moved(n.q, n.zs, fs, combined(c_qp, by_t, c_qq, by_s));
    n.zs *= fs, n.zt *= ft, n.zh *= exp2_fast(by_s * kLog2e), n.overlap *= fs * ft;
    n.top_s = top_s, n.top_t = top_t;
  }
  // Without the term of weight 0, which may be infinite.
  static __device__ __forceinline__ float combined(float c, float x, float d, float y) {
    return c == 0 ? d * y : d == 0 ? c * x : fmaf(d, y, c * x);
  }
};
// Of Norms relative to the same maxima.
struct AddMoved {
  __device__ __forceinline__ Norms operator()(const Norms& a, const Norms& b) const {
    Norms out;
    out.zs = a.zs + b.zs, out.zt = a.zt + b.zt, out.p = a.p + b.p, out.q = a.q + b.q, out.zh = a.zh + b.zh;
    out.centered = a.centered + b.centered, out.overlap = a.overlap + b.overlap;
    return out;
  }
  __device__ __forceinline__ Norms over_warp(Norms value, int lanes) const {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      value.zs += shuffle_xor(value.zs, mask), value.zt += shuffle_xor(value.zt, mask);
      value.p += shuffle_xor(value.p, mask), value.q += shuffle_xor(value.q, mask);
      value.zh += shuffle_xor(value.zh, mask), value.centered += shuffle_xor(value.centered, mask);
      value.overlap += shuffle_xor(value.overlap, mask);
    }
    return value;
  }
};

// Of a second sweep: value and scores of a pair, the statistics, and where the largest logits are.
struct alignas(16) Second {
  float value = 0, score = 0, forward = 0, reverse = 0, entropy_p = 0, entropy_q = 0, overlap = 0, pad[3] = {};
  int at_s = INT32_MAX, at_t = INT32_MAX;
};
struct AddSecond {
  __device__ __forceinline__ Second operator()(const Second& a, const Second& b) const {
    Second out;
    out.value = a.value + b.value, out.score = a.score + b.score;
    out.forward = a.forward + b.forward, out.reverse = a.reverse + b.reverse;
    out.entropy_p = a.entropy_p + b.entropy_p, out.entropy_q = a.entropy_q + b.entropy_q;
    out.overlap = a.overlap + b.overlap;
    out.at_s = min(a.at_s, b.at_s), out.at_t = min(a.at_t, b.at_t);
    return out;
  }
  __device__ __forceinline__ Second over_warp(Second value, int lanes) const {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = (*this)(value, shuffle_xor(value, mask));
    return value;
  }
};
static_assert(sizeof(Norms) == kSweptReduction && sizeof(Second) == kSweptReduction);

template <class X>
struct SweptRow {
  static constexpr int kL = kLanes<X>;

  DenseRows<X>& rows;
  const DenseLaunch& launch;
  const DenseArgs& args;
  Cluster& team;
  const Place<X>& place;
  const RowScales& k;
  float picked;
  const bool hard, own;  // own: the hard terms' exponentials are not those at T
  const bool teacher, streamed, special;
  MoveNorms add;
  float unit;  // of a linear divergence
  Norms n;
  // Of its sums.
  float inverse_s = 0, inverse_t = 0, log_zt = 0, log_zs = 0, log_zt_zs = 0;
  // Of a pair: p, q on a common scale are et factor_p, es factor_q.
  float factor_p = 0, factor_q = 0, post = 1, score_sum = 0, mean_q = 0;

  __device__ __forceinline__ bool linear() const { return launch.functor == kNoFunctor; }
  __device__ __forceinline__ bool distils() const { return launch.kd_weight != 0; }

  __device__ __forceinline__ SweptRow(DenseRows<X>& rows, Cluster& team, const RowScales& scales, float label_logit)
      : rows(rows),
        launch(rows.launch),
        args(rows.args),
        team(team),
        place(rows.place),
        k(scales),
        picked(launch.student_softcap != 0 ? launch.student_softcap * tanhf(label_logit / launch.student_softcap)
                                           : label_logit),
        hard(launch.ce_weight != 0 || launch.z_loss_weight != 0 || args.stats != nullptr),
        own(hard && k.scale_s != kLog2e),
        teacher(rows.reads_teacher),
        streamed(launch.plan.source == Source::kStreamed),
        special(launch.student_softcap != 0 || launch.teacher_softcap != 0 ||
                args.teacher_form == TeacherForm::kProbs) {
    const Linear& c = launch.coefficients;
    // Without the teacher's logarithms the student's temperature is the better unit.
    const bool of_student = c.c_pp == 0 && c.c_qp == 0;
    const float ratio = of_student ? 1.0f : k.ratio;
    unit = of_student ? k.unit_s : k.unit_t;
    add = {k.scale_s, k.scale_t, float(c.c_pp), float(c.c_pq) * ratio, float(c.c_qp), float(c.c_qq) * ratio};
  }

  // A vector of both rows.
  struct Vectors {
    float s[kL], t[kL];
  };
  // Logits as the objective sees them: after softcaps, of probabilities their logarithms; -inf past the row's ends. One
  // copy of the code.
  static __device__ __noinline__ Vectors transformed(const DenseLaunch& launch, int first, Vectors x) {
    const float cap_s = launch.student_softcap, cap_t = launch.teacher_softcap;
    const bool probs = launch.args.teacher_form == TeacherForm::kProbs;
#pragma unroll
    for (int l = 0; l < kL; ++l) {
      if (cap_s != 0) x.s[l] = cap_s * tanhf(x.s[l] / cap_s);
      if (probs) {
        x.t[l] = x.t[l] > 0 ? logf(x.t[l]) : x.t[l] == 0 ? -INFINITY : NAN;
      } else if (cap_t != 0) {
        x.t[l] = cap_t * tanhf(x.t[l] / cap_t);
      }
      if (first + l < 0 || first + l >= int(launch.args.columns)) x.s[l] = x.t[l] = -INFINITY;
    }
    return x;
  }
  __device__ __forceinline__ void unpack_both(int i, const uint4& s, const uint4& t, Vectors& x) const {
    unpack<X>(s, x.s);
    unpack<X>(t, x.t);
    if (special) x = transformed(launch, place.first(i), x);
  }

  // Calls visit(i, x) for the thread's vectors. A row that is too wide for shared memory comes by copies of the
  // thread's own, a few vectors ahead.
  template <class Visit>
  __device__ __forceinline__ void sweep(bool backwards, Visit visit) const {
    const int steps = (place.count + team.threads - 1) / team.threads;
    const uint32_t at_s = rows.student(rows.stage) + 16 * team.thread, at_t = at_s + 16 * rows.capacity;
    const int stride = 16 * team.threads;
    const auto vector_of = [&](int j) {
      return j < steps ? (backwards ? steps - 1 - j : j) * team.threads + team.thread : place.count;
    };
    Whole whole_s, whole_t;
    if (streamed) {
      whole_s = place.whole(place.s, rows.columns), whole_t = place.whole(place.t, rows.columns);
      for (int j = 0; j < kDenseRing; ++j) copy_ahead(j, vector_of(j), whole_s, whole_t);
    }
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      // Together again, so that a warp's accesses are whole sectors.
      __syncwarp();
      const int turn = backwards ? steps - 1 - j : j, i = turn * team.threads + team.thread;
      const uint32_t at = (streamed ? j % kDenseRing : turn) * stride;
      if (streamed) copies_done_but<kDenseRing - 1>();
      Vectors x;
      const bool there = i < place.count;
      const uint4 raw_s = load_shared_if(there, at_s + at), raw_t = load_shared_if(there, (teacher ? at_t : at_s) + at);
      if (streamed) copy_ahead(j + kDenseRing, vector_of(j + kDenseRing), whole_s, whole_t);
      if (!there) continue;
      unpack_both(i, raw_s, raw_t, x);
      visit(i, x);
    }
    if (streamed) copies_done();
  }
  __device__ __forceinline__ void copy_ahead(int j, int i, const Whole& whole_s, const Whole& whole_t) const {
    if (i < place.count) {
      const uint32_t at = rows.student(0) + 16 * (j % kDenseRing * team.threads + team.thread);
      rows.copy_vector(place, whole_s, place.s, place.s + place.first(i), i, at);
      if (teacher) rows.copy_vector(place, whole_t, place.t, place.t + place.first(i), i, at + 16 * rows.capacity);
    }
    copies_are_a_group();
  }

  __device__ __forceinline__ void find_tops() {
    Tops tops;
    if (streamed) {
      tops.s = order_of(n.top_s), tops.t = order_of(n.top_t);
      tops = team.over(tops, MaxTops());
      add.move(n, of_order(tops.s), of_order(tops.t));
    } else {
      uint4 most_s = lowest_vector(), most_t = most_s;
      const uint32_t at_s = rows.student(rows.stage), at_t = rows.teacher(rows.stage);
#pragma unroll 2
      for (int i = team.thread; i < place.count; i += team.threads) {
        most_s = packed_max<X>(most_s, load_shared(at_s + 16 * i));
        if (teacher) most_t = packed_max<X>(most_t, load_shared(at_t + 16 * i));
      }
      tops.s = order_of(largest<X>(most_s)), tops.t = order_of(largest<X>(most_t));
      tops = team.over(tops, MaxTops());
      // Softcaps and logarithms keep the order.
      Vectors x;
      x.s[0] = of_order(tops.s), x.t[0] = of_order(tops.t);
      if (special) {
#pragma unroll
        for (int l = 1; l < kL; ++l) x.s[l] = x.s[0], x.t[l] = x.t[0];
        x = transformed(launch, 0, x);
      }
      n.top_s = x.s[0], n.top_t = x.t[0];
    }
  }
  static __device__ __forceinline__ uint4 lowest_vector() {
    float x[kL];
#pragma unroll
    for (float& value : x) value = -INFINITY;
    return pack<X>(x);
  }

  // ONLINE: relative to maxima that rise on the way.
  template <bool ONLINE>
  __device__ __forceinline__ void add_up() {
    const bool smooths = values_ce(launch) && launch.label_smoothing != 0;
    const bool over_p = add.c_pp != 0 || add.c_pq != 0, over_q = add.c_qp != 0 || add.c_qq != 0;
    const bool overlaps = launch.kind == Held::kSkewKl;
    const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
    sweep(false, [&](int i, const Vectors& x) {
      if constexpr (ONLINE) {
        float high_s = n.top_s, high_t = n.top_t;
#pragma unroll
        for (float value : x.s) high_s = fmaxf(high_s, value);
#pragma unroll
        for (float value : x.t) high_t = fmaxf(high_t, value);
        if (high_s > n.top_s || high_t > n.top_t) add.move(n, high_s, high_t);
      }
      float ds[kL], es[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) {
        ds[l] = x.s[l] - n.top_s;
        es[l] = exp2_fast(ds[l] * k.scale_s);
        n.zs += es[l];
      }
      if (teacher) {
        float dt[kL], et[kL];
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          dt[l] = x.t[l] - n.top_t;
          et[l] = exp2_fast(dt[l] * k.scale_t);
          n.zt += et[l];
        }
        if (add.c_pp == 1) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.p = add_product(n.p, et[l], fmaf(ds[l], add.c_pq, dt[l]));
        } else if (over_p) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.p = add_product(n.p, et[l], fmaf(ds[l], add.c_pq, add.c_pp * dt[l]));
        }
        if (over_q) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.q = add_product(n.q, es[l], fmaf(dt[l], add.c_qp, add.c_qq * ds[l]));
        }
        if (overlaps) {
#pragma unroll
          for (int l = 0; l < kL; ++l) n.overlap = fmaf(es[l], et[l], n.overlap);
        }
      }
      if (own) {
#pragma unroll
        for (int l = 0; l < kL; ++l) n.zh += exp2_fast(ds[l] * kLog2e);
      }
      if (smooths) {
        const int first = place.first(i);
#pragma unroll
        for (int l = 0; l < kL; ++l) n.centered += first + l >= 0 && first + l < rows.columns ? x.s[l] - center : 0.0f;
      }
    });
  }

  __device__ __forceinline__ void find_norms() {
    if (streamed) {
      add_up<true>();
      find_tops();
    } else {
      find_tops();
      add_up<false>();
    }
    const float top_s = n.top_s, top_t = n.top_t;
    n = team.over(n, AddMoved());
    n.top_s = top_s, n.top_t = top_t;
    // A row of -inf is no distribution.
    if (!(n.zs > 0)) n.zs = NAN;
    if (!(n.zt > 0)) n.zt = NAN;
    inverse_s = reciprocal_fast(n.zs), inverse_t = reciprocal_fast(n.zt);
    log_zs = log_of_ratio(n.zs, 1.0f), log_zt = log_of_ratio(n.zt, 1.0f), log_zt_zs = log_of_ratio(n.zt, n.zs);
  }

  // The mean of a linear divergence's logits, and what the normalisers add.
  __device__ __forceinline__ float linear_value() {
    const Linear& c = launch.coefficients;
    mean_q = n.q * inverse_s;
    const float of_p = float(c.c_pp + c.c_qp), of_q = float(c.c_pq + c.c_qq), mean = (n.p * inverse_t + mean_q) * unit;
    if (of_p == 0) return of_q == 0 ? mean : mean - of_q * log_zs;
    return mean + of_q * log_zt_zs - (of_p + of_q != 0 ? (of_p + of_q) * log_zt : 0.0f);
  }

  // Value and score of a pair: light(visit) with a functor known when this is compiled, the lanes side by side.
  template <class F, Score FORM>
  struct Light {
    Params<float> params;
    __device__ __forceinline__ Scored<float> operator()(float p, float, float q, float) const {
      Scored<float> out;
      F::template of_difference<FORM>(params, p, q, p - q, out.value, out.score);
      return out;
    }
  };
  template <class Visit>
  __device__ __forceinline__ void with_pair(Visit visit) const {
    const Params<float> params{k.param, launch.param1, k.rest};
    const bool equal = n.zt == n.zs, decides = equal || (n.zt < 4 && n.zs < 4);
    switch (launch.kind) {
      case Held::kJsd: return visit(Light<Jsd, Score::kPlain>{params});
      case Held::kTvd:
        return equal ? visit(Light<Tvd, Score::kPlain>{params}) : visit(Light<Tvd, Score::kApart>{params});
      case Held::kSkewKl:
        return decides && n.overlap > 0.25f ? visit(Light<SkewKl, Score::kNear>{params})
                                            : visit(Light<SkewKl, Score::kPlain>{params});
      case Held::kSkewReverseKl: return visit(Light<SkewReverseKl, Score::kNear>{params});
      default: break;
    }
    visit([&](float p, float logp, float q, float logq) {
      return eval_functor<float>(AllFunctors(), launch.functor, params, p, logp, q, logq);
    });
  }
  __device__ __forceinline__ bool light() const { return is_pair(launch.kind); }

  // Calls use(l, ds, dt, scored) for the lanes of a vector.
  template <class Pair, class Use>
  __device__ __forceinline__ void score_lanes(const Pair& pair, const float (&xs)[kL], const float (&xt)[kL],
                                              Use use) const {
    const auto one = [&](float x, float y) {
      const float ds = x - n.top_s, dt = y - n.top_t;
      const float p = exp2_fast(dt * k.scale_t) * factor_p, q = exp2_fast(ds * k.scale_s) * factor_q;
      return pair(p, fmaf(dt, k.unit_t, -log_zt), q, fmaf(ds, k.unit_s, -log_zs));
    };
    if constexpr (kIsLight<Pair>) {
#pragma unroll
      for (int l = 0; l < kL; ++l) use(l, one(xs[l], xt[l]));
    } else {
      // One copy of the functors.
#pragma unroll 1
      for (int lane = 0; lane < kL; ++lane) {
        float x = xs[0], y = xt[0];
#pragma unroll
        for (int l = 1; l < kL; ++l) x = l == lane ? xs[l] : x, y = l == lane ? xt[l] : y;
        use(lane, one(x, y));
      }
    }
  }
  template <class Pair>
  struct IsLight {
    static constexpr bool value = false;
  };
  template <class F, Score FORM>
  struct IsLight<Light<F, FORM>> {
    static constexpr bool value = true;
  };
  template <class Pair>
  static constexpr bool kIsLight = IsLight<Pair>::value;

  __device__ __forceinline__ void add_statistics(int i, const float (&xs)[kL], const float (&xt)[kL],
                                                 Second& sums) const {
    const int first = place.first(i);
#pragma unroll 1
    for (int lane = 0; lane < kL; ++lane) {
      float x = xs[0], y = xt[0];
#pragma unroll
      for (int l = 1; l < kL; ++l) x = l == lane ? xs[l] : x, y = l == lane ? xt[l] : y;
      const float ds = x - n.top_s, dt = y - n.top_t;
      const float p = exp2_fast(dt * k.scale_t) * inverse_t, q = exp2_fast(ds * k.scale_s) * inverse_s;
      const float logp = dt * k.unit_t, logq = fmaf(ds, k.unit_s, log_zt_zs);
      if (fmaxf(logp, logq) != -INFINITY) {
        sums.forward += product_or_0(p, logp - logq);
        sums.reverse += product_or_0(q, logq - logp);
      }
      sums.entropy_p -= product_or_0(p, logp);
      sums.entropy_q -= product_or_0(q, logq);
      // A NaN must not lose against a number.
      sums.overlap += p < q ? p : q;
      if (ds == 0) sums.at_s = min(sums.at_s, first + lane);
      if (dt == 0) sums.at_t = min(sums.at_t, first + lane);
    }
  }

  __device__ __forceinline__ void write(const HardTerms& terms) const {
    const Linear& c = launch.coefficients;
    const bool scored = distils() && !linear(), over_q = distils() && linear() && (c.c_qp != 0 || c.c_qq != 0);
    const bool over_p = distils() && linear() && c.c_pq != 0;
    const bool terms_count = launch.ce_weight != 0 || launch.z_loss_weight != 0;
    const float scale = k.kd * k.unit_s, of_q = scale * unit * inverse_s, pulled = factor_q * score_sum;
    float of_p = -float(c.c_pq) * scale * inverse_s;
    float less_ratio_z = -(1 + (n.zs - n.zt) * inverse_t);
    const float cap = launch.student_softcap, inverse_cap = cap != 0 ? 1 / cap : 0.0f;
    const int64_t label = values_ce(launch) ? args.labels[rows.row] : -1;
    const auto finish = [&](int i, const float (&xs)[kL], float (&g)[kL]) {
      const int first = place.first(i);
      if (terms_count) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          g[l] = fmaf(terms.factor, exp2_fast((xs[l] - n.top_s) * kLog2e), g[l] - terms.floor);
        if (label >= first && label < first + kL) {
#pragma unroll
          for (int l = 0; l < kL; ++l)
            if (first + l == int(label)) g[l] -= terms.step;
        }
      }
      if (cap != 0) {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] *= 1 - (xs[l] * inverse_cap) * (xs[l] * inverse_cap);
      }
      if (first + kL > rows.columns) {
#pragma unroll
        for (int l = 0; l < kL; ++l)
          if (first + l >= rows.columns) g[l] = 0;
      }
      rows.put(i, rows.student(rows.stage) + 16 * i, g);
    };
    if (scored) {
      with_pair([&](const auto& pair) {
        sweep(true, [&](int i, const Vectors& x) {
          float g[kL] = {};
          score_lanes(pair, x.s, x.t, [&](int lane, const Scored<float>& f) {
#pragma unroll
            for (int l = 0; l < kL; ++l)
              if (l == lane) g[l] = fmaf(exp2_fast((x.s[l] - n.top_s) * k.scale_s), -pulled, f.score) * (scale * post);
          });
          finish(i, x.s, g);
        });
      });
      return;
    }
    // Kept from the compiler, which would negate them for every element.
    asm volatile("" : "+f"(less_ratio_z), "+f"(of_p));
    sweep(true, [&](int i, const Vectors& x) {
      float g[kL], es[kL];
#pragma unroll
      for (int l = 0; l < kL; ++l) es[l] = exp2_fast((x.s[l] - n.top_s) * k.scale_s);
      if (over_p) {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] = fmaf(exp2_fast((x.t[l] - n.top_t) * k.scale_t), less_ratio_z, es[l]) * of_p;
      } else {
#pragma unroll
        for (int l = 0; l < kL; ++l) g[l] = 0;
      }
      if (over_q) {
#pragma unroll
        for (int l = 0; l < kL; ++l) {
          const float slope = fmaf(x.t[l] - n.top_t, add.c_qp, add.c_qq * (x.s[l] - n.top_s)) - mean_q;
          g[l] += product_or_0(es[l], slope * of_q);
        }
      }
      finish(i, x.s, g);
    });
  }

  __device__ __forceinline__ void run() {
    find_norms();
    rows.fetch_next();
    HardTerms terms;
    if (hard) {
      const float center = fabsf(picked) < INFINITY ? picked : 0.0f;
      terms = HardTerms(launch, k.weight, n.top_s, own ? n.zh : n.zs, picked, n.centered, center);
    }
    float divergence = 0;
    Second sums;
    if (teacher) {
      const bool pair = !linear(), scalable = light();
      if (pair) {
        factor_p = scalable ? 1.0f : inverse_t;
        factor_q = !scalable ? inverse_s : n.zt == n.zs ? 1.0f : n.zt * inverse_s;
        post = scalable ? inverse_t : 1.0f;
        with_pair([&](const auto& functions) {
          sweep(true, [&](int, const Vectors& x) {
            score_lanes(functions, x.s, x.t, [&](int, const Scored<float>& f) {
              sums.value += f.value;
              sums.score += f.score;
            });
          });
        });
        if (launch.kind == Held::kJsd) sums.value += sums.score;
      }
      if (args.stats != nullptr) sweep(true, [&](int i, const Vectors& x) { add_statistics(i, x.s, x.t, sums); });
      if (pair || args.stats != nullptr) sums = team.over(sums, AddSecond());
      divergence = pair ? sums.value * post : linear_value();
      score_sum = sums.score * post;
      if (launch.kind != Held::kNone) divergence = at_least_0(divergence);
      // A functor may take what is NaN for 0.
      divergence += n.zs + n.zt - (n.zs + n.zt);
    }
    if (team.leads()) {
      static_cast<float*>(args.loss)[rows.row] = (distils() ? k.kd * divergence : 0.0f) + terms.loss;
      if (args.stats != nullptr) {
        float* const stats = static_cast<float*>(args.stats) + int64_t(rows.row) * kStats;
        stats[0] = divergence;
        stats[1] = terms.ce;
        stats[2] = terms.lse;
        stats[3] = at_least_0(sums.forward);
        stats[4] = at_least_0(sums.reverse);
        stats[5] = sums.entropy_p + log_zt;
        stats[6] = sums.entropy_q + log_zt;
        stats[7] = sums.at_s == sums.at_t ? 1.0f : 0.0f;
        stats[8] = sums.overlap;
      }
    }
    if (place.g != nullptr) write(terms);
  }
};

template <class X>
__global__ void __launch_bounds__(kDenseThreads, 2) dense_swept_kernel(const __grid_constant__ DenseLaunch launch) {
  extern __shared__ uint4 shared_memory[];
  char* const shared = reinterpret_cast<char*>(shared_memory);
  Cluster team(shared, launch.plan);
  DenseRows<X> rows(launch, team, shared, launch.kd_weight != 0 || launch.args.stats != nullptr, false);
  rows.template run<SweptRow<X>>();
}

}  // namespace cuda
}  // namespace kdk
