// The divergences' functors on a GPU, one chosen at run time.
#pragma once

#include "device.cuh"

// The functors of divergences.h find these for plain numbers.
namespace kdk {
__host__ __device__ __forceinline__ float kdk_log(float x) { return logf(x); }
__host__ __device__ __forceinline__ double kdk_log(double x) { return log(x); }
__host__ __device__ __forceinline__ float kdk_exp(float x) { return expf(x); }
__host__ __device__ __forceinline__ double kdk_exp(double x) { return exp(x); }
// Of numbers in the normal range.
__device__ __forceinline__ float kdk_inverse(float x) { return cuda::reciprocal_fast(x); }
// By a series next to 1, where that of the instruction has no digit left.
__device__ __forceinline__ float kdk_log_ratio(float u, float less_1) {
  float series = fmaf(less_1, -1.0f / 6, 0.2f);
  series = fmaf(less_1, series, -0.25f);
  series = fmaf(less_1, series, 1.0f / 3);
  series = fmaf(less_1, series, -0.5f);
  series = fmaf(less_1 * less_1, series, less_1);
  const float far = cuda::log2_fast(fmaxf(u, 1.17549435e-38f)) * float(cuda::kLn2);
  // Not a branch.
  float out;
  asm("{ .reg .pred p; setp.lt.f32 p, %3, 0f3e000000; selp.f32 %0, %1, %2, p; }"
      : "=f"(out)
      : "f"(series), "f"(far), "f"(fabsf(less_1)));
  return out;
}
template <class V>
__host__ __device__ __forceinline__ V kdk_where(bool condition, V a, V b) {
  return condition ? a : b;
}
}  // namespace kdk

#include "topk_plan.h"

namespace kdk {
namespace cuda {

template <class V>
struct Scored {
  V value, score;
};

template <class V, class... Fs>
__device__ __forceinline__ Scored<V> eval_functor(Functors<Fs...>, int functor, const Params<V>& params, V p, V logp,
                                                  V q, V logq) {
  Scored<V> out{V(), V()};
  int i = 0;
  (void)((functor == i++ ? (Fs::eval(params, p, logp, q, logq, out.value, out.score), true) : false) || ...);
  return out;
}

// f and df/dlogq of one outcome. It is large where it is inlined: call it in loops that are not unrolled.
template <class V>
__device__ __forceinline__ Scored<V> eval(const Linear& c, int functor, const Params<V>& params, V p, V logp, V q,
                                          V logq) {
  if (functor != kNoFunctor) return eval_functor<V>(AllFunctors(), functor, params, p, logp, q, logq);
  // A coefficient of 0 silences an infinite logarithm, and so does a probability of 0.
  const auto term = [](double coefficient, V log) { return coefficient != 0 ? V(coefficient) * log : V(); };
  const V over_p = p > V() ? p * (term(c.c_pp, logp) + term(c.c_pq, logq)) : V();
  const V over_q = q > V() ? q * (term(c.c_qp, logp) + term(c.c_qq, logq)) : V();
  return {over_p + over_q, V(c.c_pq) * p + V(c.c_qq) * q + over_q};
}

}  // namespace cuda
}  // namespace kdk
