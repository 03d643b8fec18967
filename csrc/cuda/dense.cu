// kdkernels::dense_fwd_cuda
#include "launch.h"

#include "dense_kernels.h"

namespace kdk {
namespace cuda {

template <>
DenseKernel dense_kernel<float>(Held held);
template <>
DenseKernel dense_kernel<__nv_bfloat16>(Held held);
template <>
DenseKernel dense_kernel<__half>(Held held);

namespace {

// How many clusters the GPU can hold at once; 0 where it cannot place one, as clusters of 16 blocks on some.
int resident_clusters(const DensePlan& plan, DenseKernel kernel, cudaLaunchConfig_t& config, int multiprocessors) {
  if (plan.cluster == 1) {
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, plan.threads, config.dynamicSmemBytes),
          "occupancy of dense_fwd");
    return blocks * multiprocessors;
  }
  if (plan.cluster > 8 &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return clusters;
}

void run_dense(const DenseArgs& args, const Tensor& student) {
  const char* const refusal = dense_refusal(args);
  STD_TORCH_CHECK(refusal == nullptr, "the CUDA kernels do not compute ", refusal);
  const OnDeviceOf device(student);
  const int64_t rows = args.batch * args.length;
  STD_TORCH_CHECK(args.width < kMaxDenseColumns && rows < (int64_t(1) << 31), "student is too large: ", rows,
                  " rows of ", args.width, " columns");
  const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device.index());
  Limits limits{attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.index()),
                attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.index()),
                attribute(cudaDevAttrClusterLaunch, device.index()) != 0 ? 16 : 1};
  for_dtype(args.student.dtype, [&](auto typed) {
    for (;; limits.cluster /= 2) {
      STD_TORCH_CHECK(limits.cluster > 0, "kdkernels: this GPU has no room for a block of dense_fwd");
      const DenseLaunch launch = prepare_dense(args, limits, multiprocessors);
      const DensePlan& plan = launch.plan;
      const DenseKernel kernel = dense_kernel<typename decltype(typed)::type>(plan.held);
      allow_shared_memory(kernel, limits.shared_per_block, "shared memory of dense_fwd");
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(unsigned(plan.cluster));
      config.blockDim = dim3(unsigned(plan.threads));
      config.dynamicSmemBytes = size_t(plan.shared_bytes);
      config.stream = device.stream();
      cudaLaunchAttribute cluster = {};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
      config.attrs = &cluster;
      config.numAttrs = plan.cluster > 1 ? 1 : 0;
      const int clusters = resident_clusters(plan, kernel, config, multiprocessors);
      if (clusters == 0) continue;
      config.gridDim = dim3(unsigned(std::min<int64_t>(rows, clusters) * plan.cluster));
      return check(cudaLaunchKernelEx(&config, kernel, launch), "dense_fwd");
    }
  });
}

}  // namespace
}  // namespace cuda
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("dense_fwd_cuda", TORCH_BOX((&kdk::dense_fwd<kdk::cuda::find_divergence, kdk::cuda::run_dense>)));
}
