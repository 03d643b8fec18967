// kdkernels::capture_topk_cuda, through the LibTorch stable ABI.
#include <cuda_runtime.h>
#include <kdkernels/options.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <kdkernels/capture.cuh>

#include <optional>
#include <tuple>
#include <vector>

namespace kdk {
namespace capture {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "kdkernels: capture_topk: ", cudaGetErrorString(error));
}

template <class X>
void launch(const Tensor& teacher, const std::optional<Tensor>& temperature_rows, int64_t k, int64_t vocab_size,
            double temperature, Tensor& ids, Tensor& logprobs, Tensor& tail) {
  const torch::stable::accelerator::DeviceGuard guard(teacher.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(teacher.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "kdkernels: torch has no current stream on this device");
  // The need of the largest k: a state of the kernel, which other threads with another k must find alike.
  check(cudaFuncSetAttribute(capture_topk_kernel<X>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(kMaxK)));
  capture_topk_kernel<X><<<unsigned(ids.size(0)), kThreads, shared_bytes(int(k)), static_cast<cudaStream_t>(stream)>>>(
      static_cast<const X*>(teacher.const_data_ptr()), teacher.stride(0), teacher.stride(1), teacher.size(1),
      int(vocab_size), int(k),
      temperature_rows ? static_cast<const float*>(temperature_rows->const_data_ptr()) : nullptr,
      temperature_rows ? temperature_rows->stride(0) : 0, float(temperature), static_cast<int*>(ids.mutable_data_ptr()),
      static_cast<float*>(logprobs.mutable_data_ptr()), static_cast<float*>(tail.mutable_data_ptr()));
  check(cudaGetLastError());
}

std::tuple<Tensor, Tensor, Tensor> capture_topk(Tensor teacher, std::optional<Tensor> temperature_rows, int64_t k,
                                                int64_t vocab_size, std::vector<double> numbers,
                                                std::vector<int64_t> choices) {
  STD_TORCH_CHECK(numbers.size() == sizeof(CaptureNumbers) / sizeof(double) && choices.empty(),
                  "the op takes one number and no choices, got ", numbers.size(), " and ", choices.size());
  const double temperature = numbers[0];
  STD_TORCH_CHECK(teacher.dim() == 3 && (teacher.stride(2) == 1 || teacher.size(2) == 1),
                  "teacher must be [B, L, V] with unit stride in the last dimension");
  const int64_t rows = teacher.size(0) * teacher.size(1);
  STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= teacher.size(2) && vocab_size < (int64_t(1) << 30),
                  "vocab_size must be in [1, ", teacher.size(2), "], got ", vocab_size);
  STD_TORCH_CHECK(k >= 1 && k <= vocab_size && k <= kMaxK, "k must be in [1, ", kMaxK, "], got ", k);
  STD_TORCH_CHECK(rows < (int64_t(1) << 31), "teacher has too many rows");
  STD_TORCH_CHECK(
      !temperature_rows || (temperature_rows->dim() == 1 && temperature_rows->size(0) == rows &&
                            temperature_rows->scalar_type() == ScalarType::Float && temperature_rows->is_cuda()),
      "temperature_rows must be float32 [N] on the teacher's device");
  Tensor ids = torch::stable::new_empty(teacher, {rows, k}, ScalarType::Int);
  Tensor logprobs = torch::stable::new_empty(teacher, {rows, k}, ScalarType::Float);
  Tensor tail = torch::stable::new_empty(teacher, {rows}, ScalarType::Float);
  if (rows > 0) {
    const auto run = [&](auto launcher) {
      launcher(teacher, temperature_rows, k, vocab_size, temperature, ids, logprobs, tail);
    };
    switch (teacher.scalar_type()) {
      case ScalarType::Float: run(launch<float>); break;
      case ScalarType::BFloat16: run(launch<__nv_bfloat16>); break;
      case ScalarType::Half: run(launch<__half>); break;
      default: STD_TORCH_CHECK(false, "teacher on a GPU must be float32, bfloat16 or float16");
    }
  }
  return {ids, logprobs, tail};
}

}  // namespace
}  // namespace capture
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CUDA, m) { m.impl("capture_topk_cuda", TORCH_BOX(&kdk::capture::capture_topk)); }
