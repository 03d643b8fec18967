#include "table_isa.h"

namespace kdk {

const KernelTable& avx512_kernels() {
  static const KernelTable kernels = table("avx512");
  return kernels;
}

}  // namespace kdk
