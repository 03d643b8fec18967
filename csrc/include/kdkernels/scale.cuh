// Multiplies the rows of a gradient by grad_output, which is read on the device.
#pragma once

#include "device.cuh"

namespace kdk {
namespace cuda {

constexpr int kScaleThreads = 256;

// Several blocks a row: block b has piece b % pieces of row b / pieces.
template <class X>
__global__ void __launch_bounds__(kScaleThreads) scale_grad_kernel(const __grid_constant__ ScaleArgs args, int pieces) {
  const int64_t row = blockIdx.x / pieces;
  const float factor = float(read_number(args.factor, args.factor_dtype, row * args.factor_stride));
  // The usual end of a loss: backward() hands in 1, and nothing is read or written.
  if (factor == 1.0f) return;
  X* g = row_pointer<X>(args.grad, row, args.length);
  const Grid<X> grid(g);
  const int width = int(args.width), vectors = grid.vectors(width);
  for (int v = int(blockIdx.x % pieces) * kScaleThreads + threadIdx.x; v < vectors; v += pieces * kScaleThreads) {
    float x[kLanes<X>];
    unpack<X>(grid.load(g, v, width), x);
#pragma unroll
    for (float& value : x) value *= factor;
    grid.store(g, v, width, x);
  }
}

}  // namespace cuda
}  // namespace kdk
