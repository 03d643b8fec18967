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
// the gradient needs. Of the row's edges, which are stored, the elements wait here: a store after them would wait for
// the cache lines they share.
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
  // Left to do when all is written: the label's element, and the acceptance rate, which is a sum over the row.
  X* label = nullptr;
  C at_label = 0;
  C* acceptance = nullptr;
  double accepted = 0, acceptance_factor = 0;

  // terms: of the row, their es, et and array where its slots begin; to: where its gradient begins.
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

// In place of a WritePending where nothing is pending.
template <class X>
struct WriteNothing {
  static constexpr bool kWrites = false;
  void stop(Pending<X>&) const {}
};

// Writes a pending gradient beside a sweep.
template <class Form, class X>
struct WritePending {
  static constexpr bool kWrites = true;
  static constexpr int64_t kBlock = Io<X>::kBlock;
  using C = typename Io<X>::C;
  using V = Vec<C>;

  GradientBlock<Form, X> gradient;
  const C* array;
  X* out;
  int64_t done = 0, blocks, first_streamed, num_streamed;
  V accepted = {};

  explicit WritePending(const Pending<X>& pending)
      : gradient(pending.terms),
        array(pending.terms.array + pending.first_slot + pending.written * kBlock),
        out(pending.out),
        blocks(pending.blocks),
        first_streamed(pending.streamed.begin),
        num_streamed(pending.streamed.end - pending.streamed.begin) {}

  // The next block, whose exponentials are at es and et.
  KDK_INLINE void write_block(const C* es, const C* et) {
    V g0, g1;
    gradient(es, et, array, nullptr, static_cast<const X*>(nullptr), accepted, g0, g1);
    if (uint64_t(done - first_streamed) < uint64_t(num_streamed)) {
      Io<X>::template store2<true>(out, g0, g1);
    } else {
      Io<X>::template store2<false>(out, g0, g1);
    }
    out += kBlock, ++done;
    if (Form::kArray) array += kBlock;
  }
  void stop(Pending<X>& pending) const {
    pending.written += done;
    pending.out = out;
    pending.blocks = blocks - done;
    pending.streamed.begin -= done, pending.streamed.end -= done;
    if (Form::kAccepted) pending.accepted += double(horizontal_sum<C>(accepted));
  }
};

// The forms that are left to be written later. With logarithms a gradient needs the logits again, and is written while
// they are in the caches.
template <class Form>
constexpr bool kMayPend = !Form::kLogs && !(Form::kAccepted && Form::kPower > 1);
// The forms that are written beside a sweep for SUMS: those that the row before it may have.
template <int SUMS, class Form>
constexpr bool may_pend_beside() {
  if (!kMayPend<Form> || Form::kTwo != (SUMS != kOneModel)) return false;
  if (SUMS & kStudent) return Form::kExtra == Extra::kNone || (Form::kArray && Form::kAccepted && (SUMS & kKept));
  if (Form::kAccepted) return false;
  if (SUMS == kForward || SUMS == kForwardAndTeacher) return true;
  return Form::kExtra == Extra::kNone || (Form::kArray && (SUMS == kBoth || SUMS == kOneModel));
}
template <class C>
bool may_pend_beside(Sums sums, const GradientTerms<C>& terms) {
  return visit_sums(sums, [&](auto made) {
    return visit_form(terms, [](auto form) { return may_pend_beside<decltype(made)::value, decltype(form)>(); });
  });
}

// Calls sweep(WritePending or WriteNothing) with the writer of a pending gradient for a sweep for SUMS.
template <int SUMS, class X, class Sweep>
KDK_INLINE void with_pending(Pending<X>& pending, Sweep sweep) {
  if (pending.blocks == 0) return sweep(WriteNothing<X>());
  visit_form(pending.terms, [&](auto form) KDK_LAMBDA_INLINE {
    if constexpr (may_pend_beside<SUMS, decltype(form)>()) {
      WritePending<decltype(form), X> writer(pending);
      sweep(writer);
      writer.stop(pending);
    } else {
      __builtin_unreachable();
    }
  });
}

template <class X>
void Pending<X>::write_blocks() {
  visit_form(terms, [&](auto form) {
    if constexpr (kMayPend<decltype(form)>) {
      // In tiles, as beside a sweep: an acceptance rate is the same to the last bit, whatever row comes next.
      while (blocks > 0) {
        const int64_t slot = first_slot + written * kBlock, count = Row<X>::kTileBlocks - written % Row<X>::kTileBlocks;
        const C *es = terms.es + slot, *et = terms.et + slot;
        WritePending<decltype(form), X> writer(*this);
        for (const int64_t end = std::min(count, writer.blocks); writer.done < end; es += kBlock, et += kBlock)
          writer.write_block(es, et);
        writer.stop(*this);
      }
    }
  });
}

// True for types of rows that can be written with the next ones: their exponentials are taken without clamps.
template <class X>
constexpr bool kDefers = kFused && std::is_same_v<typename Io<X>::C, float>;

// The edges of a row whose body is pending; out is where its gradient begins.
template <class Form, class X, class Y>
KDK_INLINE void add_edges(const Row<X, Y>& row, X* out, Pending<X>& pending) {
  using C = typename Io<X>::C;
  const GradientTerms<C>& k = pending.terms;
  const GradientBlock<Form, X> gradient(k);
  Vec<C> accepted = {};
  const auto add = [&](const X* s, const Y* t, int64_t, int64_t slot, int64_t first, auto lanes) KDK_LAMBDA_INLINE {
    if constexpr (decltype(lanes)::kEdge) {
      Vec<C> g0, g1;
      gradient(k.es + slot, k.et + slot, k.array + slot, s, t, accepted, g0, g1);
      auto& edge = pending.edges[pending.num_edges++];
      Io<X>::template store2<false>(edge.block, g0, g1);
      edge.begin = lanes.begin, edge.end = lanes.end;
      edge.to = out + (first + lanes.begin);
    }
  };
  row.template pieces<kEdges>(0, add);
  if (row.tiles() > 1) row.template pieces<kEdges>(row.tiles() - 1, add);
  if (Form::kAccepted) pending.accepted += double(horizontal_sum<C>(accepted));
}

// Leaves the gradient of a row to be written with the next one. Where terms want the acceptance rate it goes to
// acceptance, times factor.
template <class X, class Y>
void postpone(const Row<X, Y>& row, const GradientTerms<typename Io<X>::C>& terms, X* out, bool streamed,
              Pending<X>& pending, typename Io<X>::C* acceptance = nullptr, double factor = 0) {
  pending.terms = terms;
  pending.begin(row, out, streamed);
  if (terms.accepted != nullptr) pending.accept(acceptance, factor);
  visit_form(pending.terms, [&](auto form) {
    if constexpr (kMayPend<decltype(form)>) add_edges<decltype(form)>(row, out, pending);
  });
}

}  // namespace KDK_ISA
}  // namespace kdk
