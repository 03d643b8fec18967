// Torch glue of the CUDA backend: the current device and stream, errors, and the choice of a kernel by dtype.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../glue.h"
#include "kdkernels/device.cuh"

namespace kdk {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "kdkernels: ", what, ": ", cudaGetErrorString(error));
}

// While it lives, launches go to the device of a tensor and to torch's current stream there.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_) == AOTI_TORCH_SUCCESS,
                    "kdkernels: torch has no current stream on device ", index_);
  }
  int index() const { return index_; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "device attributes");
  return value;
}

// Lets launches of a kernel have all of a block's shared memory. It is a state of the kernel on this device: what one
// launch needs would be too little for another thread's that is about to begin.
template <class Kernel>
void allow_shared_memory(Kernel kernel, int per_block, const char* what) {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, kernel), what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             per_block - int(attributes.sharedSizeBytes)),
        what);
}

template <class X>
struct Typed {
  using type = X;
};

// Calls body(Typed<X>()) for the dtype of logits.
template <class Body>
void for_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(Typed<float>());
    case DType::kBFloat16: return body(Typed<__nv_bfloat16>());
    case DType::kFloat16: return body(Typed<__half>());
    case DType::kFloat64: break;
  }
  STD_TORCH_CHECK(false, "logits on a GPU must be float32, bfloat16 or float16");
}

}  // namespace cuda
}  // namespace kdk
