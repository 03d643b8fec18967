// The host's decisions about a launch of the sparse top-k kernels: the divergence, the form, the shared memory.
// Framework-free, and free of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "args.h"
#include "divergences.h"

namespace kdk {
namespace cuda {

// The functors that the kernels choose among at run time, by their place here.
template <class... Fs>
struct Functors {
  template <class F>
  static constexpr int index() {
    constexpr bool is[] = {std::is_same<F, Fs>::value...};
    for (int i = 0; i < int(sizeof...(Fs)); ++i)
      if (is[i]) return i;
    return -1;
  }
};
#define KDK_TYPE(FUNCTOR, NAME) FUNCTOR,
using AllFunctors = Functors<KDK_FUNCTORS(KDK_TYPE) AlphaBetaNoTeacher>;
#undef KDK_TYPE
constexpr int kNoFunctor = -1;

struct Divergence {
  const char* name;
  Linear coefficients;
  int functor, without_teacher;  // the latter where p = 0
  bool linear_without_teacher;
};
template <class F>
constexpr Divergence general(const char* name) {
  constexpr int functor = AllFunctors::index<F>();
  constexpr int without_teacher = AllFunctors::index<typename WithoutTeacher<F>::Functor>();
  static_assert(functor >= 0 && without_teacher >= 0, "a functor for p = 0 has to be entered in AllFunctors");
  return {name, {}, functor, without_teacher, LinearWithoutTeacher<F>::value};
}
constexpr Divergence linear(const char* name, Linear c) { return {name, c, kNoFunctor, kNoFunctor, true}; }

#include "divergence_table.h"

// Index of a divergence by name and parameters, or -1.
inline int find_divergence(const char* name, double param0, double param1) {
  const char* entry = entry_name(name, param0, param1);
  for (int i = 0; i < kNumDivergences; ++i)
    if (std::strcmp(kDivergences[i].name, entry) == 0) return i;
  return -1;
}

// The limits of a GPU.
struct Limits {
  int shared_per_block, shared_per_multiprocessor;  // bytes
  int cluster;                                      // the largest cluster of blocks; 1 where there are none
};

// How a row is worked on. A row that fits into the shared memory of a block, or of a cluster of up to 16 blocks, stays
// there: it is read once and its gradient written once. Narrow rows get a block of one warp. Other rows are read twice.
struct TopkPlan {
  bool resident = false;
  // Every outcome's value and score are needed: the teacher gives mass to those outside its entries, or a divergence is
  // not linear in q where p = 0.
  bool every = false;
  int cluster = 1, threads = 32;
  int share = 0;       // 16-byte vectors of a row that a block has
  int marks = 0;       // 32-bit words that mark entries among the vectors
  int table = 0;       // places of the hash table of entries, a power of 2
  int entries_at = 0;  // offsets in shared memory
  int row_at = 0;
  int shared_bytes = 0;
  int64_t workspace_per_row = 0;  // bytes of global memory for the entries where they are too many; 0: none
};

// Two such blocks a multiprocessor leave 128 registers a thread, which the functors in double need.
constexpr int kMaxThreads = 256;
constexpr int kMaxMarks = 8192, kMaxSharedEntryBytes = 72 << 10;
constexpr int64_t kMaxColumns = int64_t(1) << 30;

// At the start of shared memory: reductions and the numbers of the row.
constexpr int kFixedBytes = 1536;

inline TopkPlan plan_topk(const TopkArgs& args, const Limits& limits) {
  const int lanes = args.student.dtype == DType::kFloat32 ? 4 : 8, marked_by_word = 32 / lanes;
  const auto ceil_div = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
  const auto round = [](int64_t bytes) { return int((bytes + 15) / 16 * 16); };
  // Of a row that begins anywhere in 128 bytes.
  const int vectors = ceil_div(args.columns + 8 * lanes - 1, lanes);

  TopkPlan plan;
  const Divergence& divergence = kDivergences[args.divergence];
  const bool no_teacher = args.tail == Tail::kRenormalize || args.tail == Tail::kDrop;
  plan.every = args.tail == Tail::kUniform || (no_teacher && !divergence.linear_without_teacher);
  plan.table = 64;
  while (plan.table < 2 * args.entries) plan.table *= 2;
  // Two doubles, a float and an id each.
  const int64_t entries = args.entries * 24 + int64_t(plan.table) * 4;
  if (entries > kMaxSharedEntryBytes) plan.workspace_per_row = (entries + 15) / 16 * 16;
  const int shared_entries = plan.workspace_per_row > 0 ? 0 : int(entries);

  const auto lay_out = [&](int share, int marked_vectors) {
    plan.share = share;
    plan.marks = ceil_div(marked_vectors, marked_by_word);
    plan.entries_at = kFixedBytes + round(int64_t(plan.marks) * 4);
    plan.row_at = plan.entries_at + round(shared_entries);
    plan.shared_bytes = plan.row_at + (plan.resident ? share * 16 : 0);
  };
  // Two blocks a multiprocessor: one loads while the other one computes. The system takes 1 KB of each.
  const int room = std::min(limits.shared_per_block, limits.shared_per_multiprocessor / 2 - 1024);
  plan.resident = true;
  for (plan.cluster = 1; plan.cluster <= limits.cluster; plan.cluster *= 2) {
    const int share = ceil_div(vectors, 8 * plan.cluster) * 8;
    lay_out(share, share);
    if (plan.shared_bytes <= room && (plan.workspace_per_row == 0 || plan.cluster == 1)) break;
  }
  if (plan.cluster > limits.cluster) {
    plan.resident = false;
    plan.cluster = 1;
    lay_out(vectors, std::min(vectors, kMaxMarks * marked_by_word));
  }
  // Four vectors a thread and more.
  plan.threads = std::min(kMaxThreads, std::max(1, ceil_div(plan.share, 4 * 32)) * 32);
  return plan;
}

// The kernels' argument.
struct TopkLaunch {
  TopkArgs args;
  TopkPlan plan;
  Linear coefficients;
  int functor, without_teacher;  // of the entries; of the outcomes without a teacher
  void* workspace;               // [N, workspace_per_row]
};

inline TopkLaunch prepare_topk(const TopkArgs& args, const Limits& limits) {
  const Divergence& divergence = kDivergences[args.divergence];
  return {args,   plan_topk(args, limits), divergence.coefficients, divergence.functor, divergence.without_teacher,
          nullptr};
}

}  // namespace cuda
}  // namespace kdk
