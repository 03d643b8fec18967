// The dense patterns of one instruction set by the student's type: dense_<type>_<isa>.cpp compiles those of one type,
// for the compiler takes as long for each of them, and dense_<isa>.cpp chooses among them.
#pragma once

#include "dense.h"
#include "simd.h"

namespace kdk {
inline namespace KDK_ISA {

template <class X>
void dense_rows(const DenseArgs& args, int64_t begin, int64_t end);
template <class X>
void dkd_rows(const DkdArgs& args, int64_t begin, int64_t end);
template <class X>
void mse_rows(const MseArgs& args, int64_t begin, int64_t end);
template <class X>
void scale_rows(const ScaleArgs& args, int64_t begin, int64_t end);

}  // namespace KDK_ISA
}  // namespace kdk
