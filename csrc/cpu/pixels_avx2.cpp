#include "pixels.h"

namespace kdk {
inline namespace KDK_ISA {

template void pixel_rows<float>(const PixelArgs&, int64_t, int64_t);
template void pixel_rows<double>(const PixelArgs&, int64_t, int64_t);

}  // namespace KDK_ISA
}  // namespace kdk
