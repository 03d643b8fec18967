// The host's decisions about a launch of the dense kernels: the kernel, the blocks of a row, the shared memory.
// Framework-free, and free of CUDA.
#pragma once

#include "topk_plan.h"

namespace kdk {
namespace cuda {

// Divergences with a kernel that keeps a row's exponentials in registers; the others go through the swept kernel.
enum class Held { kForwardKl, kReverseKl, kJeffreys, kJsd, kTvd, kSkewKl, kSkewReverseKl, kNone };

inline Held held_kind(int divergence) {
  constexpr const char* names[] = {"forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_reverse_kl"};
  for (int i = 0; i < int(Held::kNone); ++i)
    if (std::strcmp(kDivergences[divergence].name, names[i]) == 0) return Held(i);
  return Held::kNone;
}

// How the logits come to a block: by bulk copies (rows on 16 bytes, compute capability 9.0 and later), by copies of
// each thread's own, or, where they fit no shared memory, by copies of a few vectors a thread, again for every sweep.
enum class Source { kBulk, kCopies, kStreamed };

// A cluster of blocks works on one row after the other. While it works on one, the next one's logits come into the
// other stage of shared memory, where there are two.
struct DensePlan {
  Held held = Held::kNone;
  Source source = Source::kCopies;
  int cluster = 1, threads = 32, stages = 2;
  int share = 0;                       // 16-byte vectors of a row that a block has
  int capacity = 0;                    // those of a tensor in a stage: what the threads cover
  int part_bytes = 0, slot_bytes = 0;  // of a warp's part of a reduction, and of all parts
  int pieces = 0;                      // vectors of a thread, at most
  int row_at = 0, shared_bytes = 0;
  bool flat = true;      // all rows of a tensor lie one stride apart
  bool aligned = false;  // rows begin, and their columns end, on 16 bytes
};

constexpr int kHeldColumns = 64;        // of a thread, where its exponentials stay in registers
constexpr int kDenseThreads = 256;      // the most of a block
constexpr int kDenseControlBytes = 64;  // barriers
constexpr int kDenseRing = 4;           // vectors of a row that a thread has on their way, where they are streamed
constexpr int kReductionSlots = 2;      // one is written while the other may still be read
constexpr int kHeldReduction = 16;      // bytes of a warp
constexpr int kSweptReduction = 48;
constexpr int64_t kMaxDenseColumns = int64_t(1) << 30;

struct DenseLaunch {
  DenseArgs args;
  DensePlan plan;
  Linear coefficients;
  int functor;  // kNoFunctor: linear
  Held kind;    // of the divergence, whichever kernel runs
  int64_t rows;
  float scale, param0, param1, rest, temperature, teacher_temperature, kd_weight, ce_weight, z_loss_weight,
      label_smoothing, student_softcap, teacher_softcap;
};

// A reason why the dense kernels cannot run a call, or null.
inline const char* dense_refusal(const DenseArgs& args) {
  if (args.mixture != Mixture::kNone || args.num_teachers != 1) return "a mixture of several teachers";
  if (args.standardize) return "standardize=True";
  if (args.teacher_lse.data != nullptr) return "a teacher that is normalised elsewhere";
  if (args.kd_weights.data != nullptr || args.ce_weights.data != nullptr || args.z_loss_weights.data != nullptr)
    return "weights of terms per row";
  if (args.teachers[0].dtype != args.student.dtype) return "a teacher of another dtype than the student";
  if (args.student.dtype == DType::kFloat64) return "float64";
  return nullptr;
}

inline DensePlan plan_dense(const DenseArgs& args, const Limits& limits, int multiprocessors) {
  const int size = args.student.dtype == DType::kFloat32 ? 4 : 2, lanes = 16 / size, pieces = kHeldColumns / lanes;
  const int64_t rows = args.batch * args.length;
  const auto ceil_div = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
  const auto aligned = [&](const LogitsView& view) {
    return view.data == nullptr || (reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.stride_b % lanes == 0 &&
                                    view.stride_l % lanes == 0);
  };
  const auto flat = [&](const LogitsView& view) {
    return view.data == nullptr || args.batch == 1 || view.stride_b == args.length * view.stride_l;
  };
  DensePlan plan;
  plan.flat = flat(args.student) && flat(args.dstudent) && flat(args.teachers[0]);
  plan.aligned =
      args.columns % lanes == 0 && aligned(args.student) && aligned(args.teachers[0]) && aligned(args.dstudent);
  plan.source = plan.aligned && limits.cluster > 1 ? Source::kBulk : Source::kCopies;
  // Of a row that begins anywhere in 128 bytes, unless it begins on 16.
  const int vectors = ceil_div(args.columns + (plan.aligned ? 0 : 8 * lanes - 1), lanes);

  const bool plain = args.kd_weight != 0 && args.stats == nullptr && args.student_softcap == 0 &&
                     args.teacher_softcap == 0 && args.teacher_form == TeacherForm::kLogits;
  plan.held = plain ? held_kind(args.divergence) : Held::kNone;
  const auto lay_out = [&](int reduction) {
    plan.part_bytes = reduction;
    plan.slot_bytes = plan.cluster * (plan.threads / 32) * reduction;
    plan.row_at = (kDenseControlBytes + kReductionSlots * plan.slot_bytes + 127) / 128 * 128;
    const int64_t bytes = plan.row_at + int64_t(plan.stages) * 2 * plan.capacity * 16;
    plan.shared_bytes = int(std::min<int64_t>(bytes, INT32_MAX));
    return bytes <= limits.shared_per_block;
  };
  const auto share_of = [&](int blocks) { return ceil_div(vectors, 8 * blocks) * 8; };
  const auto choose = [&](int most) {
    plan.cluster = 1;
    while (plan.cluster < limits.cluster && share_of(plan.cluster) > most) plan.cluster *= 2;
    // Few rows are spread over more blocks, down to a warp each.
    while (plan.cluster < limits.cluster && rows * plan.cluster * 2 <= multiprocessors &&
           share_of(plan.cluster) > 32 * pieces)
      plan.cluster *= 2;
    plan.share = share_of(plan.cluster);
    plan.threads = std::min(std::max(1, ceil_div(plan.share, pieces * 32)) * 32, kDenseThreads);
  };
  // Blocks of 128 threads, two of which share the registers of a multiprocessor, or of up to 256.
  if (plan.held != Held::kNone) {
    choose(kDenseThreads / 2 * pieces);
    plan.pieces = ceil_div(plan.share, plan.threads);
    plan.capacity = plan.threads * plan.pieces;
    for (plan.stages = 2; plan.stages >= 1 && plan.pieces <= pieces; --plan.stages)
      if (lay_out(kHeldReduction)) return plan;
  }
  plan.held = Held::kNone;
  choose(kDenseThreads / 2 * pieces);
  plan.capacity = plan.share;
  for (plan.stages = 2; plan.stages >= 1; --plan.stages)
    if (lay_out(kSweptReduction)) return plan;
  // Too wide.
  plan.source = Source::kStreamed;
  plan.stages = 1;
  for (;; plan.threads = std::max(1, plan.threads / 64) * 32) {
    plan.capacity = kDenseRing * plan.threads;
    if (lay_out(kSweptReduction) || plan.threads == 32) return plan;
  }
}

inline DenseLaunch prepare_dense(const DenseArgs& args, const Limits& limits, int multiprocessors) {
  const Divergence& divergence = kDivergences[args.divergence];
  DenseLaunch launch{args,
                     plan_dense(args, limits, multiprocessors),
                     divergence.coefficients,
                     divergence.functor,
                     held_kind(args.divergence),
                     args.batch * args.length};
  launch.scale = float(args.scale);
  launch.param0 = float(args.param0), launch.param1 = float(args.param1), launch.rest = float(1 - args.param0);
  launch.temperature = float(args.temperature);
  launch.teacher_temperature = float(args.teacher_temperature_value);
  launch.kd_weight = float(args.kd_weight), launch.ce_weight = float(args.ce_weight);
  launch.z_loss_weight = float(args.z_loss_weight), launch.label_smoothing = float(args.label_smoothing);
  launch.student_softcap = float(args.student_softcap), launch.teacher_softcap = float(args.teacher_softcap);
  return launch;
}

}  // namespace cuda
}  // namespace kdk
