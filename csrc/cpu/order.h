// The patterns on the order of a row for all types of logits; included once by every order_<isa>.cpp.
#pragma once

#include "topp.h"
#include "uld.h"

namespace kdk {
inline namespace KDK_ISA {

#define KDK_INSTANTIATE(X)                                     \
  template void uld_rows<X>(const UldArgs&, int64_t, int64_t); \
  template void topp_rows<X>(const ToppArgs&, int64_t, int64_t);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(BFloat16)
KDK_INSTANTIATE(Half)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace KDK_ISA
}  // namespace kdk
