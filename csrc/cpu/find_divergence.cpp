#include "divergence_list.h"

#include "kernels.h"

namespace kdk {

int find_divergence(const char* name, double param0, double param1) {
  const char* entry = entry_name(name, param0, param1);
  for (int i = 0; i < kNumDivergences; ++i)
    if (std::strcmp(kDivergences[i].name, entry) == 0) return i;
  return -1;
}

}  // namespace kdk
