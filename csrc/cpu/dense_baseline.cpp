#include "dense_kernels.h"
#include "sparse.h"

namespace kdk {

const KernelTable& baseline_kernels() {
  static const KernelTable table{"baseline", run_dense, run_dkd, run_mse, run_topk, run_scale, run_capture};
  return table;
}

}  // namespace kdk

namespace kdk {

int find_divergence(const char* name, double param0, double param1) {
  const char* entry = entry_name(name, param0, param1);
  for (int i = 0; i < kNumDivergences; ++i)
    if (std::strcmp(kDivergences[i].name, entry) == 0) return i;
  return -1;
}

}  // namespace kdk
