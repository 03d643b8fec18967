// Included once by every contraction_<isa>.cpp, which gets the flags of the kernels of that instruction set.
#pragma once

#include "vector.h"

#if defined(__AVX2__) && !defined(__FMA__)
#error "vector.h takes fused multiply-adds for granted beside AVX2: compile with -mfma too"
#endif

namespace kdk {
inline namespace KDK_ISA {

// The exact product is 1 + 2^-11 + 2^-24, and rounding it leaves out the last term. The kernels keep logits of 1e4
// apart by that: where x * c - r has two roundings, losses are off by up to 1. GCC fuses nothing at -O1 (the pass
// belongs to -fexpensive-optimizations), nor does any compiler with -ffp-contract=off.
bool contracts() {
  if (!kFused) return true;
  // Not known when this is compiled.
  volatile float factor = 1.0f + 0x1p-12f, subtracted = 1.0f + 0x1p-11f;
  const VecF x = VecF{} + factor;
  const float c = factor, r = subtracted;
  const VecF difference = x * c - r;
  for (int i = 0; i < kLanes<float>; ++i)
    if (difference[i] != 0x1p-24f) return false;
  return true;
}

}  // namespace KDK_ISA
}  // namespace kdk
