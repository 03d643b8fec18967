// kdkernels::topk_fwd_cuda
#include "launch.h"

#include "kdkernels/topk.cuh"

namespace kdk {
namespace cuda {
namespace {

using Kernel = void (*)(TopkLaunch);

Limits limits_of(int device) {
  Limits limits{attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), 1};
  if (attribute(cudaDevAttrClusterLaunch, device) != 0) limits.cluster = 16;
  return limits;
}

// Clusters of 16 blocks, and those of large blocks, are not to be had on every GPU.
bool fits(const TopkLaunch& launch, Kernel kernel, cudaLaunchConfig_t& config) {
  if (launch.plan.cluster == 1) return true;
  if (launch.plan.cluster > 8 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  int clusters = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess && clusters > 0;
}

void run_topk(const TopkArgs& args, const Tensor& student) {
  const OnDeviceOf device(student);
  const int64_t rows = args.batch * args.length;
  Limits limits = limits_of(device.index());
  STD_TORCH_CHECK(
      args.width < kMaxColumns && args.entries < (int64_t(1) << 28) && rows * limits.cluster < (int64_t(1) << 31),
      "student is too large: ", rows, " rows of ", args.width, " columns, ", args.entries, " entries");
  for_dtype(args.student.dtype, [&](auto typed) {
    using X = typename decltype(typed)::type;
    for (;; limits.cluster /= 2) {
      TopkLaunch launch = prepare_topk(args, limits);
      const TopkPlan& plan = launch.plan;
      const Kernel kernel = topk_fwd_kernel<X>;
      allow_shared_memory(kernel, limits.shared_per_block, "shared memory of topk_fwd");
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(unsigned(rows * plan.cluster));
      config.blockDim = dim3(unsigned(plan.threads));
      config.dynamicSmemBytes = size_t(plan.shared_bytes);
      config.stream = device.stream();
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
      config.attrs = &cluster;
      config.numAttrs = plan.cluster > 1 ? 1 : 0;
      if (!fits(launch, kernel, config)) continue;
      std::optional<Tensor> workspace;
      if (plan.workspace_per_row > 0) {
        workspace = torch::stable::new_empty(student, {rows * plan.workspace_per_row}, ScalarType::Byte);
        launch.workspace = workspace->mutable_data_ptr();
      }
      return check(cudaLaunchKernelEx(&config, kernel, launch), "topk_fwd");
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("topk_fwd_cuda", TORCH_BOX((&kdk::topk_fwd<kdk::cuda::find_divergence, kdk::cuda::run_topk>)));
}
