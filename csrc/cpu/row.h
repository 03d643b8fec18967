// One row of both models, cut into tiles that stay in L1, and these into blocks of two vectors.
#pragma once

#include "io.h"

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace kdk {
inline namespace KDK_ISA {

constexpr int64_t kTileElements = 2048;

constexpr int64_t kPrefetchBytes = 4096;

enum Part { kWhole, kBody, kEdges };

// The lanes of a block, for load_block: all of them count.
template <class X>
struct AllLanes {
  static constexpr bool kEdge = false;
};
// Of a single block only the elements [begin, end) count, less one that may be excluded.
template <class X>
struct SomeLanes {
  static constexpr bool kEdge = true;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using C = typename Io<X>::C;
  using Mask = typename VecOf<C>::Mask;
  using Lane = std::conditional_t<sizeof(C) == 8, int64_t, int32_t>;
  int64_t begin, end;
  Mask first, second;

  SomeLanes(int64_t from, int64_t to, int64_t excluded) : begin(from), end(to) {
    static constexpr Elements elements = in_order_of_slots(std::make_index_sequence<size_t(kBlock)>());
    first = counts(load<Mask>(elements.at), Lane(from), Lane(to), Lane(excluded));
    second = counts(load<Mask>(elements.at + kBlock / 2), Lane(from), Lane(to), Lane(excluded));
  }

 private:
  struct Elements {
    alignas(64) Lane at[size_t(kBlock)];
  };
  template <size_t... K>
  static constexpr Elements in_order_of_slots(std::index_sequence<K...>) {
    return {{Lane(Io<X>::element(int64_t(K)))...}};
  }
  static KDK_INLINE Mask counts(Mask j, Lane from, Lane to, Lane excluded) {
    return (j >= from) & (j < to) & (j != excluded);
  }
};

// A block of logits of type Y as the two vectors that it would be as X.
template <class X, class Y, class V>
KDK_INLINE void load2_as(const Y* y, V& a, V& b) {
  if constexpr (std::is_same_v<X, Y>) {
    Io<X>::load2(y, a, b);
  } else {
    static_assert(std::is_same_v<Y, typename Io<X>::C>, "the teacher's logits are of the student's type or its sums'");
    a = load<V>(y), b = load<V>(y + kLanes<Y>);
    if (Io<X>::element(1) == 2) even_and_odd(a, b);
  }
}

// The two vectors of a block, with padding in place of what does not count.
template <class X, class Y, class C>
KDK_INLINE void load_block(const Y* x, AllLanes<X>, C, Vec<C>& a, Vec<C>& b) {
  load2_as<X>(x, a, b);
}
template <class X, class Y, class C>
KDK_INLINE void load_block(const Y* x, const SomeLanes<X>& lanes, C padding, Vec<C>& a, Vec<C>& b) {
  load2_as<X>(x, a, b);
  a = kdk_where(lanes.first, a, Vec<C>{} + padding);
  b = kdk_where(lanes.second, b, Vec<C>{} + padding);
}

// One row of both models, cut into blocks, aligned where the gradient is streamed. Elements that fill no
// block at either end are read in place, in a block of which only a part counts: the first and the last of the row.
// Copies of them, made when the row was begun, cost a wait for its last line from memory. X is the student's type, and
// gives the order of elements in a block, Y the teacher's: the same, or that of the sums.
template <class X, class Y = X>
struct Row {
  using C = typename Io<X>::C;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  static constexpr int64_t kTileBlocks = kTileElements / kBlock;

  const X* s;
  const Y* t;
  int64_t n, head, body, tail;  // elements: all, before the body, and after it; the body in blocks
  int64_t excluded = -1;        // an element
  X short_s[kBlock];
  Y short_t[kBlock];

  Row(const X* student, const Y* teacher, int64_t columns, int64_t head_elements)
      : s(student), t(teacher), n(columns), head(columns < kBlock ? 0 : head_elements) {
    body = (n - head) / kBlock;
    tail = n - head - body * kBlock;
    if (n >= kBlock) return;
    // Nothing may be read before a row that is shorter than a block.
    std::memset(static_cast<void*>(short_s), 0, sizeof(short_s));
    std::memset(static_cast<void*>(short_t), 0, sizeof(short_t));
    std::copy(s, s + n, short_s + kBlock - n);
    std::copy(t, t + n, short_t + kBlock - n);
  }

  // Leaves element j out of all sums, by treating it as -inf on both sides.
  void exclude(int64_t j) { excluded = j; }

  bool padded(int64_t tile) const { return (tile == 0 && head > 0) || (tile == tiles() - 1 && tail > 0); }
  int64_t tiles() const { return std::max<int64_t>(1, (body + kTileBlocks - 1) / kTileBlocks); }
  int64_t slots() const { return (body + (head > 0) + (tail > 0)) * kBlock; }

  int64_t slot(int64_t j) const {
    if (j < head) return Io<X>::slot(j);
    const int64_t base = head > 0 ? kBlock : 0, rest = j - head, full = body * kBlock;
    if (rest >= full) return base + full + Io<X>::slot(j - (n - kBlock));
    return base + (rest / kBlock) * kBlock + Io<X>::slot(rest % kBlock);
  }

  // Calls visit(s, t, blocks, slot, first, lanes) for the pieces of a tile in order: first is the element at s, and of
  // the edges, a block each, only some lanes count.
  template <Part PART = kWhole, class Visit>
  KDK_INLINE void pieces(int64_t tile, Visit visit) const {
    const int64_t base = head > 0 ? 1 : 0;
    if constexpr (PART != kBody) {
      if (tile == 0 && head > 0) visit(s, t, int64_t(1), int64_t(0), int64_t(0), SomeLanes<X>(0, head, excluded));
    }
    if constexpr (PART != kEdges) inner_pieces(tile, visit, base);
    if constexpr (PART != kBody) {
      if (tile == tiles() - 1 && tail > 0) {
        const int64_t first = n - kBlock;
        visit(first < 0 ? short_s : s + first, first < 0 ? short_t : t + first, int64_t(1), (base + body) * kBlock,
              first, SomeLanes<X>(kBlock - tail, kBlock, excluded - first));
      }
    }
  }

 private:
  template <class Visit>
  KDK_INLINE void inner_pieces(int64_t tile, Visit visit, int64_t base) const {
    int64_t begin = tile * kTileBlocks;
    const int64_t end = std::min(body, begin + kTileBlocks);
    if (excluded >= head) {
      const int64_t hole = (excluded - head) / kBlock;
      if (hole >= begin && hole < end) {
        const int64_t first = head + hole * kBlock;
        span(visit, begin, hole, base);
        visit(s + first, t + first, int64_t(1), (base + hole) * kBlock, first,
              SomeLanes<X>(0, kBlock, excluded - first));
        begin = hole + 1;
      }
    }
    span(visit, begin, end, base);
  }

  template <class Visit>
  KDK_INLINE void span(Visit visit, int64_t begin, int64_t end, int64_t base) const {
    if (begin < end) {
      const int64_t first = head + begin * kBlock;
      visit(s + first, t + first, end - begin, (base + begin) * kBlock, first, AllLanes<X>());
    }
  }
};

struct Range {
  int64_t begin, end;
};

// The elements, and the slots, that belong to a tile.
template <class R>
Range tile_elements(const R& row, int64_t tile, int64_t n) {
  const int64_t begin = row.head + tile * R::kTileBlocks * R::kBlock;
  return {tile == 0 ? 0 : begin, tile == row.tiles() - 1 ? n : begin + R::kTileBlocks * R::kBlock};
}
template <class R>
Range tile_slots(const R& row, int64_t tile) {
  const int64_t base = row.head > 0 ? R::kBlock : 0;
  const int64_t begin = base + tile * R::kTileBlocks * R::kBlock;
  return {tile == 0 ? 0 : begin, tile == row.tiles() - 1 ? row.slots() : begin + R::kTileBlocks * R::kBlock};
}

// Fetches what comes kPrefetchBytes after COUNT elements, every cache line of it: the processor's own prefetching gives
// up where a part of the lines is there already. The addresses may lie past the end of the logits; they are only hints.
template <int64_t COUNT, class X>
KDK_INLINE void prefetch_ahead(const X* elements) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(elements) + kPrefetchBytes;
  for (int64_t offset = 0; offset < COUNT * int64_t(sizeof(X)); offset += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + uintptr_t(offset)));
}

constexpr int64_t kLineBytes = 64;

// Asks for the cache lines of the edges of a row that is streamed: they are stored, and what is stored after them waits
// until the lines are there.
template <class X, class Y>
KDK_INLINE void prefetch_edges(const Row<X, Y>& row, const X* out) {
  if (row.head > 0) __builtin_prefetch(out, 1);
  if (row.tail > 0 && out != nullptr) __builtin_prefetch(out + row.n - 1, 1);
}

// How many elements stand before the first aligned one, so that whole blocks, and at best whole cache lines, can be
// streamed.
template <class X>
int64_t head_elements(const X* out, bool streamed) {
  if (!streamed) return 0;
  constexpr int64_t alignment = std::min<int64_t>(kLineBytes, Io<X>::kBlock * int64_t(sizeof(X)));
  const int64_t over = int64_t(reinterpret_cast<uintptr_t>(out) % alignment);
  return over == 0 ? 0 : (alignment - over) / int64_t(sizeof(X));
}

}  // namespace KDK_ISA
}  // namespace kdk
