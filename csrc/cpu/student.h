// Sweeps over the student's row alone.
#pragma once

#include "sweep.h"

namespace kdk {
inline namespace KDK_ISA {

// Exponentials of a tile of the student into es, its x into xs where KEEP_X, and their sum.
template <bool KEEP_X, class X, class Y, class C>
double student_exponentials(const Row<X, Y>& row, int64_t tile, const Affine<C> student, C* es, C* xs) {
  using V = Vec<C>;
  constexpr int64_t block = Io<X>::kBlock;
  constexpr C masked = -std::numeric_limits<C>::infinity();
  V sum0 = {}, sum1 = {};
  row.pieces(tile, [&](const X* s, const Y*, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    C *es_out = es + slot, *xs_out = xs + slot;
    V local0 = sum0, local1 = sum1;
    const Affine<C> as = student;
    for (int64_t b = 0; b < blocks; ++b, s += block, es_out += block, xs_out += block) {
      prefetch_ahead<block>(s);
      V s0, s1;
      load_block(s, lanes, masked, s0, s1);
      const V x0 = as(s0), x1 = as(s1);
      const V e0 = exp2_fast<kExpDegree<X>>(clamp_exponent(x0)), e1 = exp2_fast<kExpDegree<X>>(clamp_exponent(x1));
      local0 += e0;
      local1 += e1;
      store(es_out, e0);
      store(es_out + kLanes<C>, e1);
      if (KEEP_X) {
        store(xs_out, x0);
        store(xs_out + kLanes<C>, x1);
      }
    }
    sum0 = local0;
    sum1 = local1;
  });
  return horizontal_sum<C>(sum0 + sum1);
}

// A tile without clamps and x; NaN when a logit was out of bounds. A block of the pending gradient is written for every
// block of the body.
template <class X, class Y, class Writer>
KDK_INLINE double student_exponentials_unclamped(const Row<X, Y>& row, int64_t tile, const Affine<float>& as, float* es,
                                                 Writer& writer) {
  using V = VecF;
  constexpr int64_t block = Io<X>::kBlock;
  const float scale = as.scale(), bias = as.bias(), masked = as.masked_logit();
  V sum0 = {}, sum1 = {};
  Bounds bounds;
  row.pieces(tile, [&](const X* s, const Y*, int64_t blocks, int64_t slot, int64_t, auto lanes) KDK_LAMBDA_INLINE {
    float* es_out = es + slot;
    V local0 = sum0, local1 = sum1;
    Bounds local_bounds = bounds;
    int64_t b = 0;
    if constexpr (Writer::kWrites && decltype(lanes)::kEdge) {
      // The last block of a body may be where the tail of the next row goes.
      if (slot > 0 && writer.done < writer.blocks) writer.write_block(es_out, es_out);
    }
    if constexpr (Writer::kWrites && !decltype(lanes)::kEdge) {
      // The pending gradient begins where the body does.
      const int64_t both = std::min(blocks, writer.blocks - writer.done);
      Writer local_writer = writer;
#pragma GCC unroll 2
      for (; b < both; ++b, s += block, es_out += block) {
        local_writer.write_block(es_out, es_out);
        prefetch_ahead<block>(s);
        V e[2];
        Io<X>::load2(s, e[0], e[1]);
        exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
        local0 += e[0];
        local1 += e[1];
        store(es_out, e[0]);
        store(es_out + kLanes<float>, e[1]);
      }
      writer = local_writer;
    }
    for (; !lanes.kEdge && b + 2 <= blocks; b += 2, s += 2 * block, es_out += 2 * block) {
      prefetch_ahead<2 * block>(s);
      for (int h = 0; h < 2; ++h) {
        V e[2];
        Io<X>::load2(s + h * block, e[0], e[1]);
        exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
        local0 += e[0];
        local1 += e[1];
        store(es_out + h * block, e[0]);
        store(es_out + h * block + kLanes<float>, e[1]);
      }
    }
    if (b < blocks) {
      V e[2];
      load_block(s, lanes, masked, e[0], e[1]);
      exp2_of_logits<kExpDegree<X>>(e, scale, bias, local_bounds);
      local0 += e[0];
      local1 += e[1];
      for (int i = 0; i < 2; ++i) store(es_out + i * kLanes<float>, e[i]);
    }
    sum0 = local0;
    sum1 = local1;
    bounds = local_bounds;
  });
  return bounds.kept() ? double(horizontal_sum<float>(sum0 + sum1)) : std::numeric_limits<double>::quiet_NaN();
}

// In place of a Pending where there is none.
struct NothingPending {
  void finish() const {}
};
constexpr NothingPending kNothingPending;
template <int SUMS, class X, class Write>
KDK_INLINE void with_pending(const NothingPending&, Write write) {
  write(WriteNothing<X>());
}

template <bool KEEP_X, class X, class Y, class C, class Waiting>
double student_exponentials(const Row<X, Y>& row, int64_t tile, const Affine<C>& as, C* es, C* xs, bool& unclamped,
                            Waiting& pending) {
  if constexpr (kFused && std::is_same_v<C, float> && !KEEP_X) {
    if (unclamped && as.in_exp_range(as)) {
      double z;
      with_pending<kOneModel, X>(pending, [&](auto&& writer) KDK_LAMBDA_INLINE {
        z = student_exponentials_unclamped(row, tile, as, es, writer);
      });
      if (!std::isnan(z)) return z;
      unclamped = false;
    }
  }
  pending.finish();
  return student_exponentials<KEEP_X>(row, tile, as, es, xs);
}

// The student's exponentials of the whole row, and their sum, from the reference of its first elements, or from its
// maximum where those were too far below it. The pending gradient is written meanwhile.
template <bool KEEP_X, class X, class Waiting = const NothingPending>
double sweep_student(const Row<X>& row, int64_t n, double scale, Affine<typename Io<X>::C>& as, typename Io<X>::C* es,
                     typename Io<X>::C* xs, Waiting& pending = kNothingPending) {
  double z = 0;
  const auto sweep = [&](double reference, bool from_maximum) KDK_LAMBDA_INLINE {
    as = affine<typename Io<X>::C>(scale, reference);
    z = 0;
    bool unclamped = true;
    for (int64_t tile = 0; tile < row.tiles() && (from_maximum || !(z > kLargestSum)); ++tile)
      z += student_exponentials<KEEP_X>(row, tile, as, es, xs, unclamped, pending);
    pending.finish();
    return !(z > kLargestSum);
  };
  sweep_in_range(maximum(row.s, std::min(n, kSeedElements)), sweep, [&] { return maximum(row.s, n); });
  return z;
}

}  // namespace KDK_ISA
}  // namespace kdk
