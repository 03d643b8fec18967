#include "table_isa.h"

namespace kdk {

const KernelTable& avx2_kernels() {
  static const KernelTable kernels = table("avx2");
  return kernels;
}

}  // namespace kdk
