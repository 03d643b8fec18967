#include "table_isa.h"

namespace kdk {

const KernelTable& baseline_kernels() {
  static const KernelTable kernels = table("baseline");
  return kernels;
}

}  // namespace kdk
