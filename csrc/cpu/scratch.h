// Buffers of a thread for the rows that it works on.
#pragma once

#include "vector.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kdk {
inline namespace KDK_ISA {

// Growing buffers of one thread, kept between calls, each at a place of its own within a page: the time of a row
// does not depend on where the C library puts them.
constexpr size_t kPageBytes = 4096;
template <class C>
struct Scratch {
  std::vector<C> storage[8];
  C* get(int which, int64_t elements) {
    std::vector<C>& buffer = storage[which];
    const size_t needed = size_t(elements) + 2 * kPageBytes / sizeof(C);
    if (buffer.size() < needed) buffer.resize(needed);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    return reinterpret_cast<C*>((address + kPageBytes - 1) / kPageBytes * kPageBytes) +
           uintptr_t(which) * kPageBytes / 8 / sizeof(C);
  }
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};
enum ScratchUse { kEs, kEt, kE1, kTerms, kStudentRow, kTeacherRow, kOtherRow, kGradientRow };

}  // namespace KDK_ISA
}  // namespace kdk
