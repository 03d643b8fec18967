#include "dense_kernels.h"
#include "topk_kernels.h"

namespace kdk {

const KernelTable& avx2_kernels() {
  static const KernelTable table{"avx2", run_dense, run_dkd, run_mse, run_topk, run_scale};
  return table;
}

}  // namespace kdk
