// The patterns of one instruction set, by the type of the logits that they are called with; included once by every
// table_<isa>.cpp.
#pragma once

#include "patterns.h"

namespace kdk {
inline namespace KDK_ISA {

inline void run_dense(const DenseArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { dense_rows<decltype(x)>(args, begin, end); });
}
inline void run_pixels(const PixelArgs& args, int64_t begin, int64_t end) {
  args.student.dtype == DType::kFloat64 ? pixel_rows<double>(args, begin, end) : pixel_rows<float>(args, begin, end);
}
inline void run_dkd(const DkdArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { dkd_rows<decltype(x)>(args, begin, end); });
}
inline void run_mse(const MseArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { mse_rows<decltype(x)>(args, begin, end); });
}
inline void run_topk(const TopkArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { topk_rows<decltype(x)>(args, begin, end); });
}
inline void run_scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.grad.dtype, [&](auto x) { scale_rows<decltype(x)>(args, begin, end); });
}
inline void run_capture(const CaptureArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.teacher.dtype, [&](auto x) { capture_rows<decltype(x)>(args, begin, end); });
}

inline void run_shards(const ShardArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { shard_rows<decltype(x)>(args, begin, end); });
}
inline void run_tokens(const TokenArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.logits.dtype, [&](auto x) { token_rows<decltype(x)>(args, begin, end); });
}

inline void run_uld(const UldArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.student.dtype, [&](auto x) { uld_rows<decltype(x)>(args, begin, end); });
}
inline void run_topp(const ToppArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.logits.dtype, [&](auto x) { topp_rows<decltype(x)>(args, begin, end); });
}

inline KernelTable table(const char* name) {
  return {name,      run_dense,   run_pixels, run_dkd,    run_mse, run_topk,
          run_scale, run_capture, run_shards, run_tokens, run_uld, run_topp};
}

}  // namespace KDK_ISA
}  // namespace kdk
