// kdkernels::scale_grad_cuda
#include "launch.h"

#include "kdkernels/scale.cuh"

namespace kdk {
namespace cuda {
namespace {

void run_scale(const ScaleArgs& args, const Tensor& grad) {
  const OnDeviceOf device(grad);
  const int64_t rows = args.batch * args.length;
  for_dtype(args.grad.dtype, [&](auto typed) {
    using X = typename decltype(typed)::type;
    // Few rows are cut into pieces, so that they still fill a GPU.
    const int64_t needed = (args.width / kLanes<X> + kScaleThreads) / kScaleThreads;
    const int pieces = int(std::max<int64_t>(1, std::min<int64_t>(needed, 2048 / rows)));
    STD_TORCH_CHECK(rows * pieces < (int64_t(1) << 31) && args.width < (int64_t(1) << 30), "grad is too large");
    scale_grad_kernel<X><<<unsigned(rows * pieces), kScaleThreads, 0, device.stream()>>>(args, pieces);
    check(cudaGetLastError(), "scale_grad");
  });
}

}  // namespace
}  // namespace cuda
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("scale_grad_cuda", TORCH_BOX(&kdk::scale_grad<kdk::cuda::run_scale>));
}
