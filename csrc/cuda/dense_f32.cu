#include "dense_kernels.h"

namespace kdk {
namespace cuda {

KDK_DENSE_KERNELS(float)

}  // namespace cuda
}  // namespace kdk
