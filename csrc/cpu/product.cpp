#include "product.h"

#include "../glue.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace kdk {

namespace {

#if defined(KDK_HAVE_AVX512)
// The block product of torch's attention on a CPU, made by oneDNN: c [m, n] = a [m, k] b, or += that, with b in pairs
// of rows. It belongs to no stable interface. Its name in the library tells the types of its arguments, so that a torch
// that has changed them has no function of this name, and one that has changed their meaning fails the trial below.
using Multiply = void (*)(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row, int64_t c_row, bool add,
                          const void* a, const void* b, float* c, bool packed);
using Release = void (*)(bool packed);
constexpr const char* kMultiply = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
constexpr const char* kRelease = "_ZN2at6native7cpublas14brgemm_releaseEb";

struct Engine {
  Multiply multiply = nullptr;
  Release release = nullptr;
};

// Rows of a block of a, and of k that are multiplied at a time. oneDNN compiles a kernel for every shape and keeps it:
// blocks of one size keep them few, however many rows a call has.
constexpr int64_t kRows = 64, kDepth = 1024;

struct Buffer {
  std::unique_ptr<uint16_t[]> memory;
  uint16_t* data = nullptr;
  size_t size = 0;

  uint16_t* get(size_t count) {
    if (count > size) {
      memory.reset(new uint16_t[count + 32]);
      data = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t(63));
      size = count;
    }
    poison(data, count * sizeof(uint16_t));
    return data;
  }
};

// The smaller operand is packed once for all threads; panels or blocks of the other each by the thread that needs them.
void multiply(const Engine& run, const ProductArgs& args) {
  static thread_local Buffer shared;
  const int64_t panels = (args.n + kPanelColumns - 1) / kPanelColumns, blocks = (args.m + kRows - 1) / kRows;
  const bool shares_a = args.m <= args.n;
  const bool direct = !args.a_is_float && args.a_column == 1 && args.k % kPackedMultiple == 0;
  const int64_t depth = shares_a && direct ? args.k : std::min(args.k, kDepth);
  for (int64_t start = 0; start < args.k; start += depth) {
    const int64_t length = std::min(depth, args.k - start), packed = packed_length(length);
    const int64_t a_row = direct ? args.a_row : packed;
    const uint16_t* bf16 = static_cast<const uint16_t*>(args.a) + start;
    const bool add = args.add || start > 0;
    if (shares_a) {
      if (!direct) {
        uint16_t* to = shared.get(size_t(args.m * packed));
        torch::stable::parallel_for(0, args.m, 16, [&](int64_t begin, int64_t end) {
          pack_a_avx512(args, begin, end - begin, start, length, to + begin * packed);
        });
        bf16 = to;
      }
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        static thread_local Buffer buffer;
        const int64_t most = std::min(packed, kDepth);
        uint16_t* panel = buffer.get(size_t(most * kPanelColumns));
        for (int64_t column = begin * kPanelColumns; column < std::min(args.n, end * kPanelColumns);
             column += kPanelColumns) {
          const int64_t columns = std::min(kPanelColumns, args.n - column);
          for (int64_t k = 0; k < length; k += most) {
            const int64_t part = std::min(most, length - k);
            pack_b_avx512(args, column, start + k, part, panel);
            for (int64_t row = 0; row < args.m; row += kRows) {
              run.multiply(std::min(kRows, args.m - row), columns, packed_length(part), a_row, kPanelColumns,
                           args.c_row, add || k > 0, bf16 + row * a_row + k, panel, args.c + row * args.c_row + column,
                           true);
            }
          }
        }
        run.release(true);
      });
    } else {
      const int64_t panel = packed * kPanelColumns;
      uint16_t* b = shared.get(size_t(panels * panel));
      torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) pack_b_avx512(args, p * kPanelColumns, start, length, b + p * panel);
      });
      torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        static thread_local Buffer buffer;
        uint16_t* block = direct ? nullptr : buffer.get(size_t(kRows * packed));
        for (int64_t row = begin * kRows; row < std::min(args.m, end * kRows); row += kRows) {
          const int64_t rows = std::min(kRows, args.m - row);
          if (!direct) pack_a_avx512(args, row, rows, start, length, block);
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t column = p * kPanelColumns;
            run.multiply(rows, std::min(kPanelColumns, args.n - column), packed, a_row, kPanelColumns, args.c_row, add,
                         direct ? bf16 + row * a_row : block, b + p * panel, args.c + row * args.c_row + column, true);
          }
        }
        run.release(true);
      });
    }
  }
}

// True where small whole numbers are multiplied right, on both ways through multiply().
bool is_right(const Engine& run) {
  constexpr int64_t kSmall = 3, kLarge = 70, kK = 41;
  std::vector<uint16_t> a(kLarge * kK), b(kLarge * kK);
  const auto value = [](int64_t row, int64_t k) { return float((row * 7 + k * 3) % 13 - 6); };
  for (int64_t i = 0; i < kLarge; ++i) {
    for (int64_t k = 0; k < kK; ++k) {
      float x = value(i, k);
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof(bits));
      a[i * kK + k] = b[i * kK + k] = uint16_t(bits >> 16);
    }
  }
  for (const bool wide : {false, true}) {
    ProductArgs args;
    args.m = wide ? kSmall : kLarge, args.n = wide ? kLarge : kSmall, args.k = kK;
    std::vector<float> c(size_t(kSmall * kLarge), 1.0f);
    args.a = a.data(), args.a_row = kK, args.a_column = 1;
    args.b = b.data(), args.b_row = 1, args.b_column = kK;
    args.c = c.data(), args.c_row = args.n, args.add = true;
    multiply(run, args);
    for (int64_t i = 0; i < args.m; ++i) {
      for (int64_t j = 0; j < args.n; ++j) {
        float sum = 1.0f;
        for (int64_t k = 0; k < kK; ++k) sum += value(i, k) * value(j, k);
        if (c[i * args.n + j] != sum) return false;
      }
    }
  }
  return true;
}

const Engine& engine() {
  static const Engine found = [] {
    Engine run;
    Dl_info info;  // of the library whose functions this one calls
    const char* wish = std::getenv("KDKERNELS_CPU_ISA");
    if (wish != nullptr && std::string(wish) != "avx512") return run;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
        dladdr(reinterpret_cast<void*>(&aoti_torch_empty_strided), &info) == 0) {
      return run;
    }
    void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return run;
    run.multiply = reinterpret_cast<Multiply>(dlsym(library, kMultiply));
    run.release = reinterpret_cast<Release>(dlsym(library, kRelease));
    dlclose(library);
    try {
      if (run.multiply == nullptr || run.release == nullptr || !is_right(run)) run = {};
    } catch (const std::exception&) {
      run = {};
    }
    return run;
  }();
  return found;
}
#endif

// The strides of a matrix, one of which is 1. Where it has a single row or column, any stride of that will do.
void set_strides(const Tensor& matrix, const char* name, int64_t& row, int64_t& column) {
  row = matrix.stride(0), column = matrix.stride(1);
  if (matrix.size(1) == 1 && row != 1) column = 1;
  if (matrix.size(0) == 1 && column != 1) row = 1;
  STD_TORCH_CHECK(row == 1 || column == 1, name, " must have a stride of 1");
}

// True where bf16_product is there: the processor's instructions, and torch's function.
bool has_bf16_product() {
#if defined(KDK_HAVE_AVX512)
  return engine().multiply != nullptr;
#else
  return false;
#endif
}

void bf16_product(Tensor a, Tensor b, Tensor out, bool add) {
  STD_TORCH_CHECK(has_bf16_product(), "this processor or this torch has no product of bf16 with fp32 results");
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && out.dim() == 2 && a.size(1) == b.size(0) &&
                      out.size(0) == a.size(0) && out.size(1) == b.size(1) && a.size(1) > 0,
                  "a, b and out must be matrices that fit");
  STD_TORCH_CHECK((a.scalar_type() == ScalarType::Float || a.scalar_type() == ScalarType::BFloat16) &&
                      b.scalar_type() == ScalarType::BFloat16 && out.scalar_type() == ScalarType::Float &&
                      (out.stride(1) == 1 || out.size(1) == 1),
                  "a must be float32 or bfloat16, b bfloat16, out float32 with unit stride in the last dimension");
  ProductArgs args;
  args.m = a.size(0), args.k = a.size(1), args.n = b.size(1);
  if (args.m == 0 || args.n == 0) return;
  args.a_is_float = a.scalar_type() == ScalarType::Float;
  args.a = a.const_data_ptr();
  set_strides(a, "a", args.a_row, args.a_column);
  args.b = static_cast<const uint16_t*>(b.const_data_ptr());
  set_strides(b, "b", args.b_row, args.b_column);
  args.c = static_cast<float*>(out.mutable_data_ptr());
  args.c_row = out.stride(0);
  args.add = add;
#if defined(KDK_HAVE_AVX512)
  multiply(engine(), args);
#endif
}

}  // namespace
}  // namespace kdk

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) { m.impl("bf16_product", TORCH_BOX(&kdk::bf16_product)); }

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CompositeImplicitAutograd, m) {
  m.impl("has_bf16_product", TORCH_BOX(&kdk::has_bf16_product));
}
