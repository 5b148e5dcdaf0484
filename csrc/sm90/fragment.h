// Where a lane stands in the fragments of warp-wide matrix instructions.
#pragma once

#include <stdint.h>

#include "config.h"
#include "ptx.h"

namespace flash_kda {

// Of an accumulator or a left operand: rows `row` and `row + 8`, columns 2t and 2t + 1 of each eight.
struct Fragment {
  uint32_t lane, row, t;

  __device__ __forceinline__ Fragment() : lane(threadIdx.x % kWarp) { split(); }

  // At the top of a loop: what depends on the lane is computed anew, instead of kept in memory.
  __device__ __forceinline__ void recompute() {
    forget(lane);
    split();
  }

  // The place of 16 x 16 elements of a tile as ldmatrix and stmatrix take it: this lane's row of one of four matrices.
  __device__ __forceinline__ uint32_t matrix_row() const { return lane % 16; }
  __device__ __forceinline__ uint32_t matrix_unit() const { return lane / 16; }

 private:
  __device__ __forceinline__ void split() { row = lane / 4, t = lane % 4; }
};

}  // namespace flash_kda
