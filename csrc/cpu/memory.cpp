#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#if defined(MADV_FREE)
#define KDK_KEEPS_MEMORY 1
#endif
#endif

namespace kdk {

void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + 4095) / 4096 * 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / 4096 * 4096;
  // Advice only: a failure changes nothing.
  if (end > begin && end - begin >= 2 * kHuge)
    (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace kdk

#if defined(KDK_KEEPS_MEMORY)
// Of torch 2.11; null in an older one.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace kdk {
namespace {

size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: STD_TORCH_CHECK(false, "memory is kept for float32, bfloat16, float16 and float64");
  }
}

// A contiguous shape, as torch's C functions take it.
struct Layout {
  int32_t dtype;
  int64_t dimensions;
  const int64_t* sizes;
  int64_t strides[8];
  size_t bytes;

  Layout(int64_t count, const int64_t* shape, ScalarType type)
      : dtype(torch::stable::detail::to<int32_t>(torch::stable::detail::from(type))), dimensions(count), sizes(shape) {
    STD_TORCH_CHECK(count <= 8, "memory is kept for tensors of at most 8 dimensions");
    int64_t elements = 1, size = 0;
    for (int64_t d = count; d-- > 0;) {
      strides[d] = elements > 0 ? elements : 1;
      STD_TORCH_CHECK(shape[d] >= 0 && !__builtin_mul_overflow(elements, shape[d], &elements),
                      "the shape of a tensor must be numbers >= 0 whose product is a number");
    }
    STD_TORCH_CHECK(!__builtin_mul_overflow(elements, int64_t(element_size(type)), &size),
                    "a tensor of too many bytes");
    bytes = size_t(size);
  }
};

Tensor fresh(const Layout& layout) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(layout.dimensions, layout.sizes, layout.strides, layout.dtype,
                                                         aoti_torch_device_type_cpu(), -1, &handle));
  Tensor tensor(handle);
  if (layout.bytes > 0) prefer_huge_pages(tensor.mutable_data_ptr(), layout.bytes);
  poison(tensor.mutable_data_ptr(), layout.bytes);
  return tensor;
}

#if defined(KDK_KEEPS_MEMORY)

// Below this a gradient stays in the caches, and so does its memory in the C library.
constexpr size_t kMinBytes = size_t(8) << 20;
// From this on one block is kept for each use, below it as many as kSmallBlocks.
constexpr size_t kLargeBytes = size_t(32) << 20, kSmallBlocks = 4;
constexpr size_t kHugePage = size_t(2) << 20;

class Shelf;

// Pages for one tensor at a time.
struct Block {
  Shelf* shelf;
  void* data;  // begins with a huge page; the space before it is not used
  size_t size;
  void* mapping;
  size_t mapped;

  Block(Shelf* home, size_t bytes) : shelf(home), size(bytes), mapped(bytes + kHugePage) {
    // Private: a forked process has pages of its own.
    mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(mapping != MAP_FAILED, "not enough memory: ", bytes, " bytes for a gradient");
    data = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(mapping) + kHugePage - 1) / kHugePage * kHugePage);
    prefer_huge_pages(data, size);
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  ~Block() {
    lend(mapped);
    munmap(mapping, mapped);
  }

  // AddressSanitizer knows nothing of pages that are mapped: to it all but the first so many bytes are out of bounds.
  void lend(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(mapping, mapped);
    ASAN_UNPOISON_MEMORY_REGION(bytes == mapped ? mapping : data, bytes);
#else
    (void)bytes;
#endif
  }

  // Lets the kernel take the pages while they are kept; false where it does not know how to. The rest of a
  // block that fills no huge page stays: to find 500 small pages in use again takes the processor longer than all the
  // others.
  bool offer_to_system() { return madvise(data, size / kHugePage * kHugePage, MADV_FREE) == 0; }

  // A smaller tensor would hold memory that nobody needs.
  bool fits(size_t bytes) const { return bytes <= size && 2 * bytes >= size; }
};

// The free blocks of one use, large ones or small ones; the last one freed comes last.
class Shelf {
 public:
  Shelf(std::string use, bool large) : use_(std::move(use)), large_(large) {}
  bool is_for(const char* use, bool large) const { return large == large_ && use_ == use; }
  std::deque<std::unique_ptr<Block>> blocks;
  size_t capacity() const { return large_ ? 1 : kSmallBlocks; }

 private:
  std::string use_;
  bool large_;
};

// Blocks come back from any thread, in the middle of anything.
class Shelves {
 public:
  std::unique_ptr<Block> take(const char* use, size_t bytes) {
    std::deque<std::unique_ptr<Block>> useless;  // unmapped without the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    Shelf& shelf = find(use, bytes >= kLargeBytes);
    for (auto block = shelf.blocks.begin(); block != shelf.blocks.end(); ++block) {
      if (!(*block)->fits(bytes)) continue;
      std::unique_ptr<Block> found = std::move(*block);
      shelf.blocks.erase(block);
      return found;
    }
    // None is of use: the sizes have changed.
    useless.swap(shelf.blocks);
    return std::make_unique<Block>(&shelf, bytes);
  }

  void give_back(std::unique_ptr<Block> block) {
    if (!block->offer_to_system()) return;
    block->lend(0);
    std::unique_ptr<Block> oldest;
    const std::lock_guard<std::mutex> lock(mutex_);
    Shelf& shelf = *block->shelf;
    if (shelf.blocks.size() == shelf.capacity()) {
      oldest = std::move(shelf.blocks.front());
      shelf.blocks.pop_front();
    }
    shelf.blocks.push_back(std::move(block));
  }

  std::vector<int64_t> sizes(const char* use) {
    std::vector<int64_t> found;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const bool large : {false, true})
      for (const auto& block : find(use, large).blocks) found.push_back(int64_t(block->size));
    return found;
  }

  void clear() {
    std::vector<std::deque<std::unique_ptr<Block>>> all;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Shelf& shelf : shelves_) {
      all.emplace_back();
      all.back().swap(shelf.blocks);
    }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  Shelf& find(const char* use, bool large) {
    for (Shelf& shelf : shelves_)
      if (shelf.is_for(use, large)) return shelf;
    shelves_.emplace_back(use, large);
    return shelves_.back();
  }

  std::mutex mutex_;
  std::deque<Shelf> shelves_;  // their addresses stay
};

// Never destroyed: tensors may outlive everything.
Shelves& shelves() {
  static Shelves* const all = [] {
    // A thread of the parent that holds the lock does not exist in a forked process.
    pthread_atfork([] { shelves().lock(); }, [] { shelves().unlock(); }, [] { shelves().unlock(); });
    return new Shelves;
  }();
  return *all;
}

void return_block(void*, void* block) { shelves().give_back(std::unique_ptr<Block>(static_cast<Block*>(block))); }

const bool kKeeps = [] {
  const char* wish = std::getenv("KDKERNELS_CPU_CACHE");
  return wish == nullptr || std::strcmp(wish, "0") != 0;
}();

Tensor kept(const Layout& layout, const char* use) {
  if (!kKeeps || layout.bytes < kMinBytes || torch_from_blob == nullptr) return fresh(layout);
  std::unique_ptr<Block> block = shelves().take(use, layout.bytes);
  block->lend(layout.bytes);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block->data, layout.dimensions, layout.sizes, layout.strides, 0,
                                                layout.dtype, aoti_torch_device_type_cpu(), -1, &handle,
                                                aoti_torch_layout_strided(), nullptr, 0, return_block, block.get()));
  poison(block->data, layout.bytes);
  (void)block.release();  // the tensor's
  return Tensor(handle);
}

#else

Tensor kept(const Layout& layout, const char*) { return fresh(layout); }

#endif

constexpr char kGradient[] = "gradient";

}  // namespace

Tensor new_gradient(const Tensor& logits) {
  const int64_t dimensions = logits.dim();
  int64_t shape[3] = {};
  STD_TORCH_CHECK(dimensions <= 3, "logits must be [B, L, V] or [N, V]");
  for (int64_t d = 0; d < dimensions; ++d) shape[d] = logits.size(d);
  return kept(Layout(dimensions, shape, logits.scalar_type()), kGradient);
}

Tensor kept_empty(std::vector<int64_t> shape, ScalarType dtype, std::string use) {
  return kept(Layout(int64_t(shape.size()), shape.data(), dtype), use.c_str());
}

std::vector<int64_t> kept_blocks(std::string use) {
#if defined(KDK_KEEPS_MEMORY)
  return shelves().sizes(use.c_str());
#else
  (void)use;
  return {};
#endif
}

void poison_memory(bool on) { poisons_memory() = on; }

void kept_release() {
#if defined(KDK_KEEPS_MEMORY)
  shelves().clear();
#endif
}

}  // namespace kdk
