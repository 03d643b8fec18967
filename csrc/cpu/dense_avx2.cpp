#include "dense_isa.h"

namespace kdk {

const KernelTable& avx2_kernels() {
  static const KernelTable table{"avx2", run_dense, run_dkd, run_mse, run_topk, run_scale, run_capture};
  return table;
}

}  // namespace kdk
