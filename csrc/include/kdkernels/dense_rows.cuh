// The common part of the dense kernels: the numbers and tensors of a row, the stages in shared memory, the loop over
// rows, and the terms of the objective that know no teacher.
#pragma once

#include "cluster.cuh"

namespace kdk {
namespace cuda {

// The numbers of a row that are known before it is read.
struct RowScales {
  float weight, kd_weight, kd, unit_s, unit_t, scale_s, scale_t,
      ratio;          // ratio: T_t / T, exactly 1 where they are equal
  float param, rest;  // rest: 1 - param

  __device__ __forceinline__ void set(const DenseLaunch& launch, float row_weight, float of_kd, float temperature,
                                      float teacher_temperature, float x0, float others) {
    weight = launch.scale * row_weight;
    kd_weight = launch.kd_weight * of_kd;
    kd = weight * kd_weight * (launch.args.scale_by_t_squared ? temperature * temperature : 1.0f);
    unit_s = reciprocal(temperature), unit_t = reciprocal(teacher_temperature);
    ratio = temperature == teacher_temperature ? 1.0f : teacher_temperature * unit_s;
    scale_s = kLog2e * unit_s, scale_t = kLog2e * unit_t;
    param = x0, rest = others;
  }
  __device__ __forceinline__ explicit RowScales(const DenseLaunch& launch) {
    set(launch, 1, 1, launch.temperature, launch.teacher_temperature, launch.param0, launch.rest);
  }
  static __device__ __forceinline__ float value_of(const PerRow& values, int64_t row, float otherwise) {
    return values.data == nullptr ? otherwise : static_cast<const float*>(values.data)[row * values.stride];
  }
  __device__ __forceinline__ void of_row(const DenseLaunch& launch, int64_t row) {
    const DenseArgs& args = launch.args;
    const float x0 = value_of(args.param, row, launch.param0);
    set(launch, value_of(args.row_weight, row, 1), value_of(args.kd_weights, row, 1),
        value_of(args.student_temperature, row, launch.temperature),
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
                         args.param.data != nullptr || args.row_weight.data != nullptr ||
                         args.kd_weights.data != nullptr;
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

__host__ __device__ constexpr bool is_pair(Held kind) { return int(kind) >= int(Held::kJsd) && kind != Held::kNone; }

// JSD with one series, as in kdkernels/kernels/divergences.py. With h = (q - p) / m and w = 1 - beta the summand is
// m (beta psi(-w h) + w psi(beta h)) for psi(x) = (1 + x) log(1 + x) - x: the terms of first order, whose sum is 0, are
// left out. Four terms are right to 1e-6 for |h| < 1/8 and beta = 1/2; beyond that the logarithms of p / m and q / m
// are large enough themselves.
struct JsdBySeries {
  float beta, w, beta2, w2, c2, c3, c4, c5;  // beta2, w2: in units of a logarithm to base 2

  __device__ __forceinline__ explicit JsdBySeries(const Params<float>& k) : beta(k.x0), w(k.rest) {
    const float c = beta * w, b = beta * beta, u = w * w;
    beta2 = beta * kLn2f, w2 = w * kLn2f;
    c2 = 0.5f * c, c3 = c * (u - b) * (1.0f / 6), c4 = c * (u * w + b * beta) * (1.0f / 12);
    c5 = c * (u * u - b * b) * (1.0f / 20);
  }
  __device__ __forceinline__ void operator()(float p, float q, float& value, float& score) const {
    const float over_m = reciprocal_fast(fmaf(q, w, fmaf(p, beta, kTiny))), difference = q - p;
    const float h = difference * over_m;
    const float near = difference * h * fmaf(h, fmaf(h, fmaf(h, c5, c4), c3), c2);
    score = q * w2 * log2_fast(fmaf(q, over_m, kTiny));
    const float far = fmaf(p * beta2, log2_fast(fmaf(p, over_m, kTiny)), score);
    // Not a branch.
    asm("{ .reg .pred p; .reg .f32 x; abs.f32 x, %3; setp.lt.f32 p, x, 0f3e000000; selp.f32 %0, %1, %2, p; }"
        : "=f"(value)
        : "f"(near), "f"(far), "f"(h));
  }
};

// Cross entropy and z-loss of a row, and their part of the gradient: factor e^ds - step at the label - floor.
struct HardTerms {
  float loss = 0, ce = 0, lse = 0, factor = 0, step = 0, floor = 0;
  bool counts = false;  // a term has a weight in this row

  HardTerms() = default;
  // zh: the sum of e^ds; centered: of the logits less center, which smoothed labels need.
  __device__ __forceinline__ HardTerms(const DenseLaunch& launch, int64_t row, float weight, float top, float zh,
                                       float picked, float centered, float center) {
    const float log_z = log_of_ratio(zh, 1.0f), smoothing = launch.label_smoothing;
    lse = top + log_z;
    const float hard = weight * launch.ce_weight * RowScales::value_of(launch.args.ce_weights, row, 1);
    const float of_lse = weight * launch.z_loss_weight * RowScales::value_of(launch.args.z_loss_weights, row, 1);
    if (values_ce(launch)) {
      // Smoothing 1 gives the label no part, and smoothing 0 none to the mean.
      ce = log_z;
      if (smoothing != 1) ce += (1 - smoothing) * (top - picked);
      if (smoothing != 0) ce += smoothing * (top - center) - smoothing * (centered / float(launch.args.columns));
      ce = at_least_0(ce);
      if (hard != 0) loss += hard * ce;
    }
    factor = hard;
    if (of_lse != 0) {
      loss += of_lse * lse * lse;
      factor += 2 * of_lse * lse;
    }
    counts = hard != 0 || of_lse != 0;
    factor *= reciprocal_fast(zh);
    step = hard * (1 - smoothing);
    floor = hard * smoothing / float(launch.args.columns);
  }
};

}  // namespace cuda
}  // namespace kdk
