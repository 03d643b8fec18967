// The rows of one call of a pattern whose gradients may be left to be written with the next row.
#pragma once

#include "pending.h"
#include "rows.h"
#include "scratch.h"

namespace kdk {
inline namespace KDK_ISA {

template <class Args, class X>
struct CallRows {
  using C = typename Io<X>::C;
  const Args& args;
  // streamed: gradients go around the caches. deferred: one may be written with the next row, or by finish(); its
  // memory must be there till then. aligned: their blocks begin where the gradient's cache lines do.
  const bool streamed, deferred, aligned;
  int64_t n = args.columns;
  Scratch<C>& scratch = Scratch<C>::mine();
  Pending<X> pending = {};

  CallRows(const Args& arguments, bool streams, bool defers, bool aligns)
      : args(arguments), streamed(streams), deferred(defers), aligned(aligns) {}

  // Room for a row's slots, with a block for either edge. A pending gradient is read where the next row goes, so the
  // body begins in one place.
  C* place_of_body(ScratchUse use) { return scratch.get(use, n + 2 * Row<X>::kBlock) + Row<X>::kBlock; }

  const X* student(int64_t row, X* out) const {
    const X* s = row_pointer<X>(args.student, row, args.length);
    if (out != nullptr && !streamed && out != s) prefetch_for_writing(out, args.width);
    return s;
  }

  // Writes the gradient of a row, or leaves it to be written later; at_label is that of the label where label is no
  // less than 0. A gradient that is left gives its acceptance rate, times factor, to acceptance.
  template <class Y>
  KDK_INLINE void write(const Row<X, Y>& row, const GradientTerms<C>& terms, X* out, bool later, int64_t label,
                        double at_label, C* acceptance = nullptr, double factor = 0) {
    const bool stores_label = label >= 0 && !(streamed && set_gradient(terms, row.slot(label), at_label));
    if (later) {
      postpone(row, terms, out, streamed, pending, acceptance, factor);
      if (stores_label) pending.label = out + label, pending.at_label = C(at_label);
    } else {
      write_gradient(row, terms, out, streamed);
      if (stores_label) from_compute(C(at_label), out + label);
    }
  }
  void finish() { pending.finish(); }
};

// Runs add(row, label, weight, out) for the rows that count, and writes the last gradient.
template <class X, class Rows, class Add>
void run_rows(Rows& rows, int64_t begin, int64_t end, Add add) {
  for_rows<X>(rows.args, begin, end, add, [&] { rows.finish(); });
}

}  // namespace KDK_ISA
}  // namespace kdk
