// Which thread of a warp holds which element of an operand, and where a right operand lies in shared memory, as the PTX
// manual draws it. layouts.cu holds all of it to CuTe.
#pragma once

#include <stdint.h>

namespace emulator {

// value: in the order of registers; of bf16 each has two.
struct Place {
  int lane, value;
};

// Rows are those of a warp, which has 16; of wgmma's 64 it is warp after warp.
constexpr Place left_bf16(int row, int k) { return {row % 8 * 4 + k % 8 / 2, (row / 8 + k / 8 * 2) * 2 + k % 2}; }
constexpr Place left_tf32(int row, int k) { return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2}; }
constexpr Place right_bf16(int n, int k) { return {n * 4 + k % 8 / 2, k / 8 * 2 + k % 2}; }
constexpr Place right_tf32(int n, int k) { return {n * 4 + k % 4, k / 4}; }
constexpr Place accumulator(int row, int n) { return {row % 8 * 4 + n % 8 / 2, n / 8 * 4 + row / 8 * 2 + n % 2}; }

// An element of one of the 8 x 8 matrices of ldmatrix and stmatrix; value: which half of the register.
constexpr Place matrix(int row, int column, bool transposed) {
  return transposed ? Place{column * 4 + row / 2, row % 2} : Place{row * 4 + column / 2, column % 2};
}

// Element (n, k) of an operand of wgmma in tiles with the 128-byte swizzle, which is one of addresses. Along the rows
// of the tiles lies k, or n if `transposed`.
constexpr uintptr_t tile_address(bool transposed, uintptr_t base, int leading, int stride, int n, int k) {
  uintptr_t address = base;
  if (transposed)
    address += n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
  else
    address += n / 8 * stride + n % 8 * 128 + k * 2;
  return address ^ (address >> 7 & 7) << 4;
}

}  // namespace emulator
