// The host's decisions about a launch of the token kernels. Framework-free, and free of CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"

namespace kdk {
namespace cuda {

constexpr int kTokenThreads = 256;
// 16-byte vectors that a thread loads at a time.
constexpr int kTokenBatch = 4;
// 32-bit words in which a block marks columns that are ids; a wider row is marked in parts.
constexpr int kTokenMarks = 4096;
constexpr int64_t kMaxTokenColumns = int64_t(1) << 30;
// 12 bytes each in the 48 KB of shared memory that every launch may have.
constexpr int64_t kMaxTokenEntries = 4096;

struct TokenPlan {
  int threads, shared_bytes;
};

// One block a row. Vectors that fill no batch of the block come one by one, at nearly twice the instructions: the
// number of warps is one that leaves few, of those near the number for which the row has a batch each.
inline int token_threads(const TokenArgs& args) {
  const int64_t lanes = args.logits.dtype == DType::kFloat32 ? 4 : 8, batch = kTokenBatch * 32;
  const int64_t vectors = args.columns / lanes;
  const int64_t most = std::max<int64_t>(1, std::min<int64_t>(kTokenThreads / 32, vectors / batch));
  int64_t best = most;
  for (int64_t warps = most - 1; 2 * warps > most; --warps)
    if (vectors % (batch * warps) < vectors % (batch * best)) best = warps;
  return int(best * 32);
}

// Backward keeps the ids of a row, their gradients and their logits; the tail of forward marks them.
inline TokenPlan plan_tokens(const TokenArgs& args) {
  const bool back = args.dlogits.data != nullptr;
  const int64_t shared = back ? args.entries * 12 : args.tail != nullptr ? int64_t(kTokenMarks) * 4 : 0;
  return {token_threads(args), int(shared)};
}

}  // namespace cuda
}  // namespace kdk
