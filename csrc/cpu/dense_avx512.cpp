#include "dense_isa.h"

namespace kdk {

const KernelTable& avx512_kernels() {
  static const KernelTable table{"avx512", run_dense, run_dkd, run_mse, run_topk, run_scale, run_capture};
  return table;
}

}  // namespace kdk
