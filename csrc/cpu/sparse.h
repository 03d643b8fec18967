// The sparse patterns of one instruction set, which sparse_<isa>.cpp compiles: a file of its own, for the compiler
// takes as long for it as for the dense ones.
#pragma once

#include "dense.h"
#include "simd.h"

namespace kdk {
inline namespace KDK_ISA {

void run_topk(const TopkArgs& args, int64_t begin, int64_t end);
void run_capture(const CaptureArgs& args, int64_t begin, int64_t end);

}  // namespace KDK_ISA
}  // namespace kdk
