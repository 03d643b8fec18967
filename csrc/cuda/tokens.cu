// kdkernels::token_fwd_cuda, kdkernels::token_bwd_cuda
#include "launch.h"

#include "kdkernels/tokens.cuh"

namespace kdk {
namespace cuda {
namespace {

using Kernel = void (*)(TokenArgs);

template <class X>
Kernel token_kernel(const TokenArgs& args) {
  const bool entropy = args.entropy != nullptr;
  if (args.dlogits.data != nullptr) return entropy ? token_bwd_kernel<X, true> : token_bwd_kernel<X, false>;
  if (args.stats != nullptr)
    return entropy ? token_fwd_kernel<X, true, true, false> : token_fwd_kernel<X, false, true, false>;
  return entropy ? token_fwd_kernel<X, true, false, false> : token_fwd_kernel<X, false, false, false>;
}

template <class X>
void launch(Kernel kernel, const TokenArgs& args, cudaStream_t stream) {
  const TokenPlan plan = plan_tokens(args);
  kernel<<<unsigned(args.batch * args.length), plan.threads, size_t(plan.shared_bytes), stream>>>(args);
  check(cudaGetLastError(), "token kernels");
}

void run_tokens(const TokenArgs& args, const Tensor& logits) {
  const OnDeviceOf device(logits);
  STD_TORCH_CHECK(args.width < kMaxTokenColumns && args.entries <= kMaxTokenEntries &&
                      args.batch * args.length < (int64_t(1) << 31),
                  "logits are too large: ", args.batch * args.length, " rows of ", args.width, " columns, ",
                  args.entries, " ids");
  for_dtype(args.logits.dtype, [&](auto typed) {
    using X = typename decltype(typed)::type;
    TokenArgs rest = args;
    rest.tail = nullptr;
    // The tail is a sweep of its own, over fewer columns than all else is.
    if (args.tail != nullptr) {
      TokenArgs only = args;
      only.entropy = only.stats = nullptr;
      launch<X>(token_fwd_kernel<X, false, false, true>, only, device.stream());
      if (args.entropy == nullptr && args.stats == nullptr) return;
    }
    launch<X>(token_kernel<X>(rest), rest, device.stream());
  });
}

}  // namespace
}  // namespace cuda
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) {
  m.impl("token_bwd_cuda", TORCH_BOX(&kdk::token_bwd<kdk::cuda::run_tokens>));
  m.impl("token_fwd_cuda", TORCH_BOX(&kdk::token_fwd<kdk::cuda::run_tokens>));
}
