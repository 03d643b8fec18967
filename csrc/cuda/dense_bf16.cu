#include "dense_kernels.h"

namespace kdk {
namespace cuda {

KDK_DENSE_KERNELS(__nv_bfloat16)

}  // namespace cuda
}  // namespace kdk
