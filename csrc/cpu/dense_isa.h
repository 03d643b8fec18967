// The patterns of one instruction set by the type they are called with; included once by every dense_<isa>.cpp.
#pragma once

#include "dense_patterns.h"
#include "sparse.h"

namespace kdk {
inline namespace KDK_ISA {

inline void run_dense(const DenseArgs& args, int64_t begin, int64_t end) {
  switch (args.student.dtype) {
    case DType::kFloat32: return dense_rows<float>(args, begin, end);
    case DType::kBFloat16: return dense_rows<BFloat16>(args, begin, end);
    case DType::kFloat16: return dense_rows<Half>(args, begin, end);
    case DType::kFloat64: return dense_rows<double>(args, begin, end);
  }
}

inline void run_dkd(const DkdArgs& args, int64_t begin, int64_t end) {
  switch (args.student.dtype) {
    case DType::kFloat32: return dkd_rows<float>(args, begin, end);
    case DType::kBFloat16: return dkd_rows<BFloat16>(args, begin, end);
    case DType::kFloat16: return dkd_rows<Half>(args, begin, end);
    case DType::kFloat64: return dkd_rows<double>(args, begin, end);
  }
}

inline void run_mse(const MseArgs& args, int64_t begin, int64_t end) {
  switch (args.student.dtype) {
    case DType::kFloat32: return mse_rows<float>(args, begin, end);
    case DType::kBFloat16: return mse_rows<BFloat16>(args, begin, end);
    case DType::kFloat16: return mse_rows<Half>(args, begin, end);
    case DType::kFloat64: return mse_rows<double>(args, begin, end);
  }
}

inline void run_scale(const ScaleArgs& args, int64_t begin, int64_t end) {
  switch (args.grad.dtype) {
    case DType::kFloat32: return scale_rows<float>(args, begin, end);
    case DType::kBFloat16: return scale_rows<BFloat16>(args, begin, end);
    case DType::kFloat16: return scale_rows<Half>(args, begin, end);
    case DType::kFloat64: return scale_rows<double>(args, begin, end);
  }
}

}  // namespace KDK_ISA
}  // namespace kdk
