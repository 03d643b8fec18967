// The patterns of sparse teachers, tokens and shards of all types of logits; included once by every sparse_<isa>.cpp.
#pragma once

#include "capture.h"
#include "shards.h"
#include "tokens.h"
#include "topk.h"

namespace kdk {
inline namespace KDK_ISA {

#define KDK_INSTANTIATE(X)                                             \
  template void topk_rows<X>(const TopkArgs&, int64_t, int64_t);       \
  template void capture_rows<X>(const CaptureArgs&, int64_t, int64_t); \
  template void shard_rows<X>(const ShardArgs&, int64_t, int64_t);     \
  template void token_rows<X>(const TokenArgs&, int64_t, int64_t);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(BFloat16)
KDK_INSTANTIATE(Half)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace KDK_ISA
}  // namespace kdk
