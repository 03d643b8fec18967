#include "dense_kernels.h"

namespace kdk {
namespace cuda {

KDK_DENSE_KERNELS(__half)

}  // namespace cuda
}  // namespace kdk
