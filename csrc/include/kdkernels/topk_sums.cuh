// The entries of a sparse teacher, and the sums over them and over the outcomes outside.
#pragma once

#include "device.cuh"
#include "functors.cuh"

#include <cfloat>

namespace kdk {
namespace cuda {

// The exponent of a logit relative to a maximum: one rounding in one instruction, unless the product of the maximum has
// lost its fraction; then the difference comes first, and an offset of all logits costs no digits however large it is.
struct Exponent {
  float high, scale, at;
  bool fused;

  __device__ __forceinline__ Exponent(float high, float scale)
      : high(high), scale(scale), at(high * scale), fused(fabsf(at) < 16777216.0f) {}
  // Both forms are a loop of their own where there is one: a choice for each logit would cost as much as both.
  __device__ __forceinline__ float by_fusing(float x) const { return fmaf(x, scale, -at); }
  __device__ __forceinline__ float by_difference(float x) const { return (x - high) * scale; }
  __device__ __forceinline__ float operator()(float x) const { return fused ? by_fusing(x) : by_difference(x); }
  // The reference that exponents are relative to.
  __device__ __forceinline__ double reference() const { return fused ? double(at) : double(high) * double(scale); }
  // By how much sums relative to this one shrink relative to another.
  __device__ __forceinline__ float to(const Exponent& other) const {
    return exp2_fast(float(reference() - other.reference()));
  }
  template <int N>
  __device__ __forceinline__ float sum(const float (&x)[N]) const {
    float total = 0;
    if (fused) {
#pragma unroll
      for (float value : x) total += exp2_fast(by_fusing(value));
    } else {
#pragma unroll
      for (float value : x) total += exp2_fast(by_difference(value));
    }
    return total;
  }
  // out += factor * 2^exponent.
  template <int N>
  __device__ __forceinline__ void add(float factor, const float (&x)[N], float (&out)[N]) const {
    if (fused) {
#pragma unroll
      for (int l = 0; l < N; ++l) out[l] = fmaf(factor, exp2_fast(by_fusing(x[l])), out[l]);
    } else {
#pragma unroll
      for (int l = 0; l < N; ++l) out[l] = fmaf(factor, exp2_fast(by_difference(x[l])), out[l]);
    }
  }
};

// The slots of a teacher's row. A slot is live when it holds a valid id, the first one of equal ids.
struct Entries {
  double *logp, *q;  // logp makes room for the score
  float* x;
  int *ids, *table;  // ids: -1 for a slot that is not live
  int slots, mask;

  __device__ __forceinline__ Entries(void* memory, int slots, int places)
      : logp(static_cast<double*>(memory)),
        q(logp + slots),
        x(reinterpret_cast<float*>(q + slots)),
        ids(reinterpret_cast<int*>(x + slots)),
        table(ids + slots),
        slots(slots),
        mask(places - 1) {}

  // Open addressing. Which ids displace which depends on the order of arrival, what is found does not: every id comes
  // to name its first slot.
  __device__ __forceinline__ int place(int id) const { return int(unsigned(id) * 2654435769u >> 7) & mask; }
  // True where the id was there already.
  __device__ __forceinline__ bool insert(int slot) const {
    const int id = ids[slot];
    for (int at = place(id);; at = (at + 1) & mask) {
      const int held = atomicCAS(&table[at], -1, slot);
      if (held == -1) return false;
      if (ids[held] == id) {
        atomicMin(&table[at], slot);
        return true;
      }
    }
  }
  // The first slot of an id, or -1.
  __device__ __forceinline__ int find(int id) const {
    for (int at = place(id);; at = (at + 1) & mask) {
      const int held = table[at];
      if (held == -1 || ids[held] == id) return held;
    }
  }
};

__device__ __forceinline__ double log_add(double a, double b) {
  const double high = fmax(a, b), low = fmin(a, b);
  return isinf(high) ? high : high + log1p(exp(low - high));
}

// Of the live entries: how many, the mass as given, sum p |log p|, the largest log-probability and logit, and the sum
// of logits less the label's.
struct Found {
  int count = 0, invalid = 0;
  double mass = 0, nats = 0, high_logp = -INFINITY, sum_x = 0;
  float high_x = -INFINITY, pad = 0;
};
// Sums of exponentials relative to those.
struct Masses {
  double teacher = 0, student = 0, student1 = 0;
};
// Of the logits outside the entries: their maximum, the sums of exponentials relative to it at temperature T and at 1,
// their sum less the label's.
struct Outside {
  float high = -FLT_MAX, z = 0, z1 = 0, sum_x = 0;
};
struct Sums {
  double value = 0, score = 0, score_outside = 0;
};
struct AddMasses {
  __device__ __forceinline__ Masses operator()(Masses a, const Masses& b) const {
    return {a.teacher + b.teacher, a.student + b.student, a.student1 + b.student1};
  }
};
struct AddSums {
  __device__ __forceinline__ Sums operator()(Sums a, const Sums& b) const {
    return {a.value + b.value, a.score + b.score, a.score_outside + b.score_outside};
  }
};
struct AddFound {
  __device__ __forceinline__ Found operator()(const Found& a, const Found& b) const {
    Found out;
    out.count = a.count + b.count;
    out.invalid = a.invalid | b.invalid;
    out.mass = a.mass + b.mass;
    out.nats = a.nats + b.nats;
    out.high_logp = fmax(a.high_logp, b.high_logp);
    out.sum_x = a.sum_x + b.sum_x;
    out.high_x = fmaxf(a.high_x, b.high_x);
    return out;
  }
};
struct AddOutside {
  float scale;
  __device__ __forceinline__ Outside operator()(const Outside& a, const Outside& b) const {
    Outside out;
    out.high = fmaxf(a.high, b.high);
    const Exponent y(out.high, scale), x(out.high, kLog2e);
    out.z = a.z * Exponent(a.high, scale).to(y) + b.z * Exponent(b.high, scale).to(y);
    out.z1 = a.z1 * Exponent(a.high, kLog2e).to(x) + b.z1 * Exponent(b.high, kLog2e).to(x);
    out.sum_x = a.sum_x + b.sum_x;
    return out;
  }
};
// Of threads: first to their maximum, for a merge of two maxima costs twenty times an addition.
struct AddOutsideOfThreads {
  float scale;
  bool own, adds;  // z1 and sum_x are of use
  template <class Lanes>
  __device__ __forceinline__ Outside operator()(Outside a, Lanes) const {
    float high = a.high;
#pragma unroll
    for (int mask = Lanes::value / 2; mask > 0; mask /= 2) high = fmaxf(high, shuffle_xor(high, mask));
    a.z *= Exponent(a.high, scale).to(Exponent(high, scale));
    if (own) a.z1 *= Exponent(a.high, kLog2e).to(Exponent(high, kLog2e));
    a.high = high;
#pragma unroll
    for (int mask = Lanes::value / 2; mask > 0; mask /= 2) {
      a.z += shuffle_xor(a.z, mask);
      if (own) a.z1 += shuffle_xor(a.z1, mask);
      if (adds) a.sum_x += shuffle_xor(a.sum_x, mask);
    }
    return a;
  }
};

}  // namespace cuda
}  // namespace kdk
