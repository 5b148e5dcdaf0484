// Where L, and then X, lie in fp32: in the place of X b, each row where that row of X b will be.
//
// Rows of 128 bytes, 128-byte swizzle: the 16-byte unit of a row is XORed with the row.
#pragma once

#include "config.h"

namespace flash_kda {

// What the lane decides of an element's byte offset: row, unit and word of the unit.
__device__ __forceinline__ constexpr uint32_t triangle_place(uint32_t row, uint32_t unit, uint32_t word) {
  return row * 128 + (((row & 7) ^ unit) << 4) + word * 4;
}

// The byte offset of the element `rows` rows and `unit` units on from `place`, in the 16 x 16 block (I, J). Units are
// added by XOR, and so are rows mod 8: what is added has no bit in common with what there is.
__device__ __forceinline__ constexpr uint32_t triangle_offset(uint32_t place, int I, int rows, int J, int unit) {
  return (place ^ ((rows & 7) ^ unit ^ J * 4) << 4) + (I * kBlock + rows) * 128;
}

template <class T>
__device__ __forceinline__ T& triangle(Tile& x, uint32_t place, int I, int rows, int J, int unit) {
  return *reinterpret_cast<T*>(x.bytes + triangle_offset(place, I, rows, J, unit));
}

}  // namespace flash_kda
