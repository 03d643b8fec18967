#include "dense_isa.h"

namespace kdk {

const KernelTable& baseline_kernels() {
  static const KernelTable table{"baseline", run_dense, run_dkd, run_mse, run_topk, run_scale, run_capture};
  return table;
}

}  // namespace kdk
