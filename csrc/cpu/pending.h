// The gradient of the last row, written while the next one is swept.
#pragma once

#include "gradient.h"
#include "sums.h"

#include <algorithm>
#include <utility>

namespace kdk {
inline namespace KDK_ISA {

// The gradient of the last row, which is written while the next one is swept, block for block: an exponential is read
// where that of the next row goes. So memory is read and written at the same time, and nothing waits for the sums that
// the gradient needs. Of the row's edges, which are stored, the elements wait here: what is stored after them would
// wait for the cache lines they share.
template <class X>
struct Pending {
  using C = typename Io<X>::C;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  struct Edge {
    alignas(64) X block[kBlock];
    int64_t begin, end;
    X* to;
  };
  GradientTerms<C> terms;
  int64_t first_slot = 0;  // of the body
  X* out = nullptr;        // the next block
  int64_t written = 0;     // blocks before that
  int64_t blocks = 0;      // from there on
  Range streamed = {0, 0};
  int num_edges = 0;
  Edge edges[2];
  // What is left to do when all is written: the label's element, and the acceptance rate, which is a sum over the row.
  X* label = nullptr;
  C at_label = 0;
  C* acceptance = nullptr;
  double accepted = 0, acceptance_factor = 0;

  // terms: of the row, their es, et and e1 where its slots begin; to: where its gradient begins.
  template <class Y>
  void begin(const Row<X, Y>& row, X* to, bool stream) {
    first_slot = row.head > 0 ? kBlock : 0;
    out = to + row.head;
    written = 0;
    blocks = row.body;
    streamed = stream ? streamed_blocks(out, blocks) : Range{0, 0};
  }
  void accept(C* to, double factor) {
    acceptance = to;
    accepted = 0;
    terms.accepted = &accepted;
    acceptance_factor = factor;
  }
  KDK_INLINE void finish() {
    if (blocks > 0) write_blocks();
    for (int k = 0; k < num_edges; ++k)
      std::copy(edges[k].block + edges[k].begin, edges[k].block + edges[k].end, edges[k].to);
    num_edges = 0;
    if (label != nullptr) from_compute(at_label, std::exchange(label, nullptr));
    if (acceptance != nullptr) *std::exchange(acceptance, nullptr) = C(accepted * acceptance_factor);
  }

 private:
  void write_blocks();
};

// Nothing to do beside a sweep.
template <class X>
struct Alone {
  static constexpr bool kWrites = false;
  void stop(Pending<X>&) const {}
};

// What is pending, written beside a sweep.
template <int CE, bool ACCEPTED, bool TWO, class X>
struct Beside {
  static constexpr bool kWrites = true;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using C = typename Io<X>::C;
  using V = Vec<C>;

  GradientBlock<false, CE, ACCEPTED, TWO, X> gradient;
  const C* e1;
  X* out;
  int64_t done = 0, blocks, first_streamed, num_streamed;
  V accepted = {};

  explicit Beside(const Pending<X>& pending)
      : gradient(pending.terms),
        e1(pending.terms.e1 + pending.first_slot + pending.written * kBlock),
        out(pending.out),
        blocks(pending.blocks),
        first_streamed(pending.streamed.begin),
        num_streamed(pending.streamed.end - pending.streamed.begin) {}

  // The next block, whose exponentials are at es and et.
  KDK_INLINE void write_block(const C* es, const C* et) {
    V g0, g1;
    gradient(es, et, e1, nullptr, static_cast<const X*>(nullptr), accepted, g0, g1);
    if (uint64_t(done - first_streamed) < uint64_t(num_streamed)) {
      Io<X>::template store2<true>(out, g0, g1);
    } else {
      Io<X>::template store2<false>(out, g0, g1);
    }
    out += kBlock, ++done;
    if (CE == kCeOwn) e1 += kBlock;
  }
  void stop(Pending<X>& pending) const {
    pending.written += done;
    pending.out = out;
    pending.blocks = blocks - done;
    pending.streamed.begin -= done, pending.streamed.end -= done;
    if (ACCEPTED) pending.accepted += double(horizontal_sum<C>(accepted));
  }
};

// Calls write(Beside or Alone) with what writes a pending gradient while sums are made that are SUMS. What is never
// pending then, and so is not among them, beside_sweep() knows.
template <int SUMS, class X, class Write>
KDK_INLINE void with_pending(Pending<X>& pending, Write write) {
  const auto with = [&](auto beside) KDK_LAMBDA_INLINE {
    write(beside);
    beside.stop(pending);
  };
  if (pending.blocks == 0) return with(Alone<X>());
  if constexpr (SUMS == kForward || SUMS == kSoft) {
    // Cross entropy's part.
    switch (pending.terms.ce) {
      case kCeSquare: return with(Beside<kCeSquare, false, true, X>(pending));
      case kCeCube: return with(Beside<kCeCube, false, true, X>(pending));
      case kCeFourth: return with(Beside<kCeFourth, false, true, X>(pending));
      case kCeOwn: return with(Beside<kCeOwn, false, true, X>(pending));
      default: break;
    }
  } else if constexpr (SUMS & kStudent) {
    if constexpr (SUMS & kKept)
      if (pending.terms.ce == kCeOwn) return with(Beside<kCeOwn, true, true, X>(pending));
    if (pending.terms.accepted != nullptr) return with(Beside<kCeNone, true, true, X>(pending));
  } else if constexpr (SUMS == kBoth || SUMS == kOneModel) {
    if (pending.terms.ce == kCeOwn) return with(Beside<kCeOwn, false, SUMS == kBoth, X>(pending));
  }
  return with(Beside<kCeNone, false, SUMS != kOneModel, X>(pending));
}
template <class C>
bool beside_sweep(int sums, const GradientTerms<C>& terms) {
  return !terms.logs && (terms.ce == kCeNone || sums == kForward || sums == kSoft || (sums & kKept) != 0);
}

template <class X>
void Pending<X>::write_blocks() {
  // In tiles, as beside a sweep: an acceptance rate is the same to the last bit, whatever row comes next.
  while (blocks > 0) {
    const int64_t slot = first_slot + written * kBlock, count = Row<X>::kTileBlocks - written % Row<X>::kTileBlocks;
    const C *es = terms.es + slot, *et = terms.et + slot;
    const auto tile = [&](auto& beside) KDK_LAMBDA_INLINE {
      if constexpr (std::decay_t<decltype(beside)>::kWrites)
        for (const int64_t end = std::min(count, beside.blocks); beside.done < end; es += kBlock, et += kBlock)
          beside.write_block(es, et);
    };
    if (!terms.two_models) {
      with_pending<kOneModel>(*this, tile);
    } else if (terms.accepted != nullptr) {
      with_pending<kAllKept>(*this, tile);
    } else {
      with_pending<kForward>(*this, tile);
    }
  }
}

// Whether rows of this type can be written with the next ones: their exponentials are taken without clamps.
template <class X>
constexpr bool kDefers = kFused && std::is_same_v<typename Io<X>::C, float>;

// The edges of a row whose body is pending; out is where its gradient begins.
template <int CE, bool ACCEPTED, bool TWO, class X, class Y>
KDK_INLINE void add_edges(const Row<X, Y>& row, X* out, Pending<X>& pending) {
  using C = typename Io<X>::C;
  const GradientTerms<C>& k = pending.terms;
  const GradientBlock<false, CE, ACCEPTED, TWO, X> gradient(k);
  Vec<C> accepted = {};
  const auto add = [&](const X* s, const Y* t, int64_t, int64_t slot, int64_t first, auto lanes) KDK_LAMBDA_INLINE {
    if constexpr (decltype(lanes)::kEdge) {
      Vec<C> g0, g1;
      gradient(k.es + slot, k.et + slot, k.e1 + slot, s, t, accepted, g0, g1);
      auto& edge = pending.edges[pending.num_edges++];
      Io<X>::template store2<false>(edge.block, g0, g1);
      edge.begin = lanes.begin, edge.end = lanes.end;
      edge.to = out + (first + lanes.begin);
    }
  };
  row.template pieces<kEdges>(0, add);
  if (row.tiles() > 1) row.template pieces<kEdges>(row.tiles() - 1, add);
  if (ACCEPTED) pending.accepted += double(horizontal_sum<C>(accepted));
}
template <class X, class Y>
void add_edges(const Row<X, Y>& row, X* out, Pending<X>& pending) {
  if (!pending.terms.two_models) {
    return pending.terms.ce == kCeOwn ? add_edges<kCeOwn, false, false>(row, out, pending)
                                      : add_edges<kCeNone, false, false>(row, out, pending);
  }
  if (pending.terms.accepted != nullptr) {
    return pending.terms.ce == kCeOwn ? add_edges<kCeOwn, true, true>(row, out, pending)
                                      : add_edges<kCeNone, true, true>(row, out, pending);
  }
  switch (pending.terms.ce) {
    case kCeSquare: return add_edges<kCeSquare, false, true>(row, out, pending);
    case kCeCube: return add_edges<kCeCube, false, true>(row, out, pending);
    case kCeFourth: return add_edges<kCeFourth, false, true>(row, out, pending);
    case kCeOwn: return add_edges<kCeOwn, false, true>(row, out, pending);
    default: return add_edges<kCeNone, false, true>(row, out, pending);
  }
}

// Leaves the gradient of a row to be written with the next one. Where terms want the acceptance rate it goes to
// acceptance, times factor.
template <class X, class Y>
void postpone(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& terms, X* out, bool streamed,
              Pending<X>& pending, typename Io<X>::C* acceptance = nullptr, double factor = 0) {
  pending.terms = terms;
  pending.begin(row, out, streamed);
  if (terms.accepted != nullptr) pending.accept(acceptance, factor);
  add_edges(row, out, pending);
}

}  // namespace KDK_ISA
}  // namespace kdk
