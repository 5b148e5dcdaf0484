// Gates and beta, before activation, to what they stand for.
#pragma once

#include "bits.h"
#include "ptx.h"

namespace flash_kda {

// What g + dt_bias of a head is multiplied by: base 2 and negative, as exp2 wants it in 1 / (1 + exp(-x)).
__device__ __forceinline__ float gate_rate(float A_log) {
  // kept finite and above zero: the sum is 0 or -inf where the gate says so, and neither may become NaN
  return -fminf(fmaxf(expf(A_log) * kLog2E, 0x1p-126f), 0x1.fffffep127f);
}

// 1 / (1 + 2^x).
__device__ __forceinline__ float sigmoid_of_minus(float x) { return reciprocal_approx(1.f + exp2_approx(x)); }

// The same times kSigmoidScale, which is the largest power of two that fp16 has.
constexpr float kSigmoidScale = 0x1p15f;
__device__ __forceinline__ float scaled_sigmoid_of_minus(float x) {
  return reciprocal_approx(fmaf(exp2_approx(x), 1 / kSigmoidScale, 1 / kSigmoidScale));
}

}  // namespace flash_kda
