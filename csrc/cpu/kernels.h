// The kernels of one instruction set as the dispatcher sees them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kdkernels/args.h"

namespace kdk {

// The kernels of one instruction set, for rows [begin, end).
struct KernelTable {
  const char* name;
  void (*dense)(const DenseArgs&, int64_t begin, int64_t end);
  void (*pixels)(const PixelArgs&, int64_t begin, int64_t end);
  void (*dkd)(const DkdArgs&, int64_t begin, int64_t end);
  void (*mse)(const MseArgs&, int64_t begin, int64_t end);
  void (*topk)(const TopkArgs&, int64_t begin, int64_t end);
  void (*scale)(const ScaleArgs&, int64_t begin, int64_t end);
  void (*capture)(const CaptureArgs&, int64_t begin, int64_t end);
  void (*shards)(const ShardArgs&, int64_t begin, int64_t end);
  void (*tokens)(const TokenArgs&, int64_t begin, int64_t end);
  void (*uld)(const UldArgs&, int64_t begin, int64_t end);
  void (*topp)(const ToppArgs&, int64_t begin, int64_t end);
};

const KernelTable& baseline_kernels();
#if defined(KDK_HAVE_AVX2)
const KernelTable& avx2_kernels();
#endif
#if defined(KDK_HAVE_AVX512)
const KernelTable& avx512_kernels();
#endif

// Index of a divergence by name and parameters, or -1.
int find_divergence(const char* name, double param0, double param1);

}  // namespace kdk
