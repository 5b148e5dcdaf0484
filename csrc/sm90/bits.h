// Number formats and places that need no instruction of their own: the emulator of the tests shares them.
#pragma once

#include <stdint.h>

namespace flash_kda {

// A condition that seldom holds: what it guards lies apart from the code that always runs, which has to stay small.
__device__ __forceinline__ constexpr bool seldom(bool x) { return __builtin_expect(x, false); }

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;  // what the squared norm of a row of q or k is increased by

__device__ __forceinline__ float2 unpack_bf16(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}

// Round to tf32, ties away from zero: the tensor core ignores the 13 low bits.
__device__ __forceinline__ uint32_t tf32(float x) { return __float_as_uint(x) + 0x1000u; }

// The 11 bits of x that the tensor core takes, if x is not rounded before.
__device__ __forceinline__ float without_low_bits(float x) { return __uint_as_float(__float_as_uint(x) & ~0x1fffu); }

// Rounded, as a number.
__device__ __forceinline__ float rounded_to_tf32(float x) { return __uint_as_float(tf32(x) & ~0x1fffu); }

// Byte offset of the 16-byte unit `unit` of row `row` in a tile with rows of 128 bytes and the 128-byte swizzle.
__device__ __forceinline__ constexpr int swizzled(int row, int unit) {
  return (row * 128 + ((row & 7) << 4)) ^ (unit << 4);
}

}  // namespace flash_kda
