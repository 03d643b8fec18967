// The patterns of one instruction set by the type of the logits. dense_<type>_<isa>.cpp compiles the dense ones of a
// type, sparse_<isa>.cpp the sparse ones and order_<isa>.cpp those on the order of a row, so that no file takes the
// compiler long; table_<isa>.cpp chooses among them.
#pragma once

#include "io.h"
#include "kernels.h"

namespace kdk {
inline namespace KDK_ISA {

template <class X>
void dense_rows(const DenseArgs& args, int64_t begin, int64_t end);
// By the type of the sums.
template <class C>
void pixel_rows(const PixelArgs& args, int64_t begin, int64_t end);
template <class X>
void dkd_rows(const DkdArgs& args, int64_t begin, int64_t end);
template <class X>
void mse_rows(const MseArgs& args, int64_t begin, int64_t end);
template <class X>
void scale_rows(const ScaleArgs& args, int64_t begin, int64_t end);
template <class X>
void topk_rows(const TopkArgs& args, int64_t begin, int64_t end);
template <class X>
void capture_rows(const CaptureArgs& args, int64_t begin, int64_t end);
template <class X>
void shard_rows(const ShardArgs& args, int64_t begin, int64_t end);
template <class X>
void token_rows(const TokenArgs& args, int64_t begin, int64_t end);
template <class X>
void uld_rows(const UldArgs& args, int64_t begin, int64_t end);
template <class X>
void topp_rows(const ToppArgs& args, int64_t begin, int64_t end);

}  // namespace KDK_ISA
}  // namespace kdk
