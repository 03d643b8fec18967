// The sums of the swept dense kernel: of a first sweep relative to maxima that may rise on the way, and of a second
// one.
#pragma once

#include "cluster.cuh"

namespace kdk {
namespace cuda {

// Of a sweep: maxima, the sums relative to them, those of a linear divergence over p and over q, that of e^ds at
// temperature 1, of the logits less the label's, and of es et.
struct alignas(16) Norms {
  float top_s = kLowest, top_t = kLowest, zs = 0, zt = 0, p = 0, q = 0, zh = 0, centered = 0, overlap = 0, pad[3] = {};
};

struct MoveNorms {
  float scale_s, scale_t, c_pp, c_pq, c_qp, c_qq;  // c_pq, c_qq: times T_t / T

  // total = sum e x to other maxima: e shrinks by factor, x grows by shift; mass is the old sum of e.
  static __device__ __forceinline__ float moved(float total, float mass, float factor, float shift) {
    const float rest = mass * factor;
    return rest == 0 ? 0.0f : fmaf(total, factor, rest * shift);
  }
  __device__ __forceinline__ void move(Norms& n, float top_s, float top_t) const {
    const float by_s = n.top_s - top_s, by_t = n.top_t - top_t;
    const float fs = exp2_fast(by_s * scale_s), ft = exp2_fast(by_t * scale_t);
    n.p = moved(n.p, n.zt, ft, combined(c_pp, by_t, c_pq, by_s));
    n.q = moved(n.q, n.zs, fs, combined(c_qp, by_t, c_qq, by_s));
    n.zs *= fs, n.zt *= ft, n.zh *= exp2_fast(by_s * kLog2e), n.overlap *= fs * ft;
    n.top_s = top_s, n.top_t = top_t;
  }
  // Without the term of weight 0, which may be infinite.
  static __device__ __forceinline__ float combined(float c, float x, float d, float y) {
    return c == 0 ? d * y : d == 0 ? c * x : fmaf(d, y, c * x);
  }
};
// Of Norms relative to the same maxima.
struct AddMoved {
  __device__ __forceinline__ Norms operator()(const Norms& a, const Norms& b) const {
    Norms out;
    out.zs = a.zs + b.zs, out.zt = a.zt + b.zt, out.p = a.p + b.p, out.q = a.q + b.q, out.zh = a.zh + b.zh;
    out.centered = a.centered + b.centered, out.overlap = a.overlap + b.overlap;
    return out;
  }
  __device__ __forceinline__ Norms over_warp(Norms value, int lanes) const {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      value.zs += shuffle_xor(value.zs, mask), value.zt += shuffle_xor(value.zt, mask);
      value.p += shuffle_xor(value.p, mask), value.q += shuffle_xor(value.q, mask);
      value.zh += shuffle_xor(value.zh, mask), value.centered += shuffle_xor(value.centered, mask);
      value.overlap += shuffle_xor(value.overlap, mask);
    }
    return value;
  }
};

// Of a second sweep: value and scores of a pair, the statistics, and where the largest logits are.
struct alignas(16) Second {
  float value = 0, score = 0, forward = 0, reverse = 0, entropy_p = 0, entropy_q = 0, overlap = 0, pad[3] = {};
  int at_s = INT32_MAX, at_t = INT32_MAX;
};
struct AddSecond {
  __device__ __forceinline__ Second operator()(const Second& a, const Second& b) const {
    Second out;
    out.value = a.value + b.value, out.score = a.score + b.score;
    out.forward = a.forward + b.forward, out.reverse = a.reverse + b.reverse;
    out.entropy_p = a.entropy_p + b.entropy_p, out.entropy_q = a.entropy_q + b.entropy_q;
    out.overlap = a.overlap + b.overlap;
    out.at_s = min(a.at_s, b.at_s), out.at_t = min(a.at_t, b.at_t);
    return out;
  }
  __device__ __forceinline__ Second over_warp(Second value, int lanes) const {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) value = (*this)(value, shuffle_xor(value, mask));
    return value;
  }
};
static_assert(sizeof(Norms) == kSweptReduction && sizeof(Second) == kSweptReduction);

}  // namespace cuda
}  // namespace kdk
