// Products of bf16 matrices with fp32 results, on processors that multiply bf16: torch has none on a CPU.
#pragma once

#include <cstdint>

namespace kdk {

// c [m, n] = a [m, k] b [k, n], or += that. Strides count elements.
struct ProductArgs {
  // bf16, or fp32 that is rounded to it; of any strides of which one is 1.
  const void* a = nullptr;
  bool a_is_float = false;
  int64_t a_row = 0, a_column = 0;
  // bf16, of any strides of which one is 1.
  const uint16_t* b = nullptr;
  int64_t b_row = 0, b_column = 0;
  float* c = nullptr;
  int64_t c_row = 0;
  int64_t m = 0, n = 0, k = 0;
  bool add = false;
};

// Columns of a panel of b, and what k is rounded up to in packed operands, with zeros: the kernels of the product may
// read that far, and what they read is multiplied.
constexpr int64_t kPanelColumns = 64, kPackedMultiple = 32;
constexpr int64_t packed_length(int64_t k) { return (k + kPackedMultiple - 1) / kPackedMultiple * kPackedMultiple; }

#if defined(KDK_HAVE_AVX512)
// Rows [row, row + rows) and columns [start, start + length) of a as bf16 [rows, packed_length(length)].
void pack_a_avx512(const ProductArgs& args, int64_t row, int64_t rows, int64_t start, int64_t length, uint16_t* out);
// Rows [start, start + length) of the panel of b that begins with column `column`: [packed_length / 2, 64, 2].
void pack_b_avx512(const ProductArgs& args, int64_t column, int64_t start, int64_t length, uint16_t* out);
#endif

}  // namespace kdk
