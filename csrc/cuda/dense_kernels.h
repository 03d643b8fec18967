// The dense kernels of one type of logits. Each type has a file of its own: they are compiled side by side.
#pragma once

#include "kdkernels/dense.cuh"

namespace kdk {
namespace cuda {

using DenseKernel = void (*)(DenseLaunch);

template <class X>
DenseKernel dense_kernel(Held held);

// Defines dense_kernel<X>.
#define KDK_DENSE_KERNELS(X)                                                        \
  template <>                                                                       \
  DenseKernel dense_kernel<X>(Held held) {                                          \
    switch (held) {                                                                 \
      case Held::kForwardKl: return dense_held_kernel<X, Held::kForwardKl>;         \
      case Held::kReverseKl: return dense_held_kernel<X, Held::kReverseKl>;         \
      case Held::kJeffreys: return dense_held_kernel<X, Held::kJeffreys>;           \
      case Held::kJsd: return dense_held_kernel<X, Held::kJsd>;                     \
      case Held::kTvd: return dense_held_kernel<X, Held::kTvd>;                     \
      case Held::kSkewKl: return dense_held_kernel<X, Held::kSkewKl>;               \
      case Held::kSkewReverseKl: return dense_held_kernel<X, Held::kSkewReverseKl>; \
      case Held::kNone: break;                                                      \
    }                                                                               \
    return dense_swept_kernel<X>;                                                   \
  }

}  // namespace cuda
}  // namespace kdk
