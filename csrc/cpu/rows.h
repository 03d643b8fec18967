// The rows of one call, one after the other: where they stand, and which of them count.
#pragma once

#include "numbers.h"
#include "row.h"

#include <algorithm>
#include <cstring>

namespace kdk {
inline namespace KDK_ISA {

// Gradients larger than this are written around the caches, which they would only flush; but not short rows, where
// aligning the writes costs more than it saves. Rows may be shorter where the next one is read while they are written.
constexpr int64_t kStreamBytes = int64_t(8) << 20, kStreamRowBytes = 3 << 10, kStreamShortRowBytes = 512;

template <class X>
X* row_pointer(const LogitsView& view, int64_t row, int64_t length) {
  const int64_t batch = row < length ? 0 : row / length;
  return static_cast<X*>(view.data) + batch * view.stride_b + (row - batch * length) * view.stride_l;
}

template <class X>
void fill_zero(X* out, int64_t begin, int64_t end) {
  if (begin < end) std::memset(static_cast<void*>(out + begin), 0, size_t(end - begin) * sizeof(X));
}

// Runs body(row, label, weight, out) for the rows that count, and writes zeros for the others; then finish().
template <class X, class Body, class Finish>
void for_rows(const RowArgs& args, int64_t begin, int64_t end, Body body, Finish finish) {
  using C = typename Io<X>::C;
  constexpr bool fp64 = sizeof(C) == 8;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = args.labels == nullptr ? 0 : args.labels[row];
    X* out = args.wants_grad ? row_pointer<X>(args.dstudent, row, args.length) : nullptr;
    if (args.labels != nullptr && label == args.ignore_index) {
      if (out != nullptr) fill_zero(out, 0, args.width);
      put<C>(args.loss, row, 0);
      continue;
    }
    const double weight = args.scale * per_row(args.row_weight, row, 1.0, fp64);
    put<C>(args.loss, row, weight * body(row, label, weight, out));
    if (out != nullptr) fill_zero(out, args.columns, args.width);
  }
  finish();
  finish_streams();
}
template <class X, class Body>
void for_rows(const RowArgs& args, int64_t begin, int64_t end, Body body) {
  for_rows<X>(args, begin, end, body, [] {});
}

inline bool streams(const RowArgs& args, int64_t element_bytes, bool deferred = false) {
  const int64_t row_bytes = deferred ? kStreamShortRowBytes : kStreamRowBytes;
  return args.wants_grad && args.dstudent.data != args.student.data && args.width * element_bytes >= row_bytes &&
         args.batch * args.length * args.width * element_bytes > kStreamBytes;
}

// True where a row stands before end and its logits are read.
inline bool is_read(const RowArgs& args, int64_t row, int64_t end) {
  return row < end && (args.labels == nullptr || args.labels[row] != args.ignore_index);
}

// Asks for the lines of a short row that will be written, so that they are there when the gradient is.
template <class X>
void prefetch_for_writing(X* out, int64_t n) {
  constexpr int64_t per_line = kLineBytes / int64_t(sizeof(X));
  for (int64_t j = 0; j < std::min(n, kStreamRowBytes / int64_t(sizeof(X))); j += per_line)
    __builtin_prefetch(out + j, 1);
}

}  // namespace KDK_ISA
}  // namespace kdk
