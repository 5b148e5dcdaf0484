// Norms of rows of q and k.
//
// P works with the rows as they are. What normalising them comes to is multiplied into results: 1 / |q| into the
// output; 1 / |k| into K~, into the rows of L, and into the rows of X, since a row of U is only ever used times its k^.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32

// One warp, with 32 channels of all rows of a chunk: four units of 16 bytes of each row of `tile`, from `first_unit`
// on.
struct Norms : Fragment {
  static constexpr uint32_t kUnits = 4;

  // The place of eight channels of all rows as ldmatrix and stmatrix take them: this lane's row.
  __device__ __forceinline__ uint32_t row_place(uint32_t unit) const { return swizzled(lane, unit); }

  // Rows past the end of the sequence hold what comes after it: they get x, two numbers of bf16.
  __device__ __forceinline__ void clear_rows(Tile& tile, uint32_t first_unit, int from, uint32_t x) const {
#pragma unroll 1
    for (uint32_t i = 0; i < kUnits; ++i)
      if (int(lane) >= from) *reinterpret_cast<uint4*>(tile.bytes + row_place(first_unit + i)) = {x, x, x, x};
    __syncwarp();
  }

  // The sums of squares of rows, to squares[row]: the diagonals of x x^T, eight channels at a time. A register of the
  // left operand then is the right operand as it is.
  __device__ __forceinline__ void row_squares(const Tile& tile, uint32_t first_unit, float* squares) const {
    float c[4][4] = {};  // of rows 8 * i + 0..7
    uint32_t a[kUnits][4];
#pragma unroll
    for (uint32_t i = 0; i < kUnits; ++i) load_matrices(a[i], tile.bytes + (row_place(first_unit) ^ i << 4));
#pragma unroll
    for (uint32_t i = 0; i < kUnits; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_bf16_8(c[j], a[i][j / 2 * 2], a[i][j / 2 * 2 + 1], a[i][j]);
    if (t == row / 2)  // the diagonal lies in these lanes
#pragma unroll
      for (int j = 0; j < 4; ++j) squares[8 * j + row] = row & 1 ? c[j][j % 2 * 2 + 1] : c[j][j % 2 * 2];
  }

  // Each row times a power of two: `exponent` is that of row `lane`.
  __device__ __forceinline__ void scale_rows(Tile& tile, uint32_t first_unit, int exponent) const {
    const float factor = power(exponent);
#pragma unroll 1
    for (uint32_t i = 0; i < 4 * kUnits; ++i) {
      uint32_t& x = *reinterpret_cast<uint32_t*>(tile.bytes + row_place(first_unit + i / 4) + i % 4 * 4);
      const float2 y = unpack_bf16(x);
      x = pack_bf16(y.x * factor, y.y * factor);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ float power(int exponent) {
    return __uint_as_float(uint32_t(127 + exponent) << 23);
  }

  // 1 / |x| of row `lane`, of rows with norms far from 1, which are multiplied by a power of two first, so that their
  // products with decays stay in range. `raw`: the sum of squares of all channels. `square_again()` gives it once more,
  // of the rows as they are then.
  template <class SquareAgain>
  __device__ __forceinline__ float unusual_norm(Tile& tile, uint32_t first_unit, float raw, bool ordinary,
                                                float inverse, const SquareAgain& square_again) const {
    const int first = raw < 0x1p-60f ? 72 : (raw < 0x1p120f ? 0 : -72);
    scale_rows(tile, first_unit, first);
    const float squares = square_again();
    const int exponent = int(__float_as_uint(squares) >> 23) - 127;
    const int rest = ordinary || squares == 0.f ? 0 : min(-(exponent >> 1), kMaxRise - first);
    scale_rows(tile, first_unit, rest);
    if (ordinary) return inverse;
    if (squares == 0.f) return 0.f;  // nothing: not even a large factor of zero, which values might overflow with
    const int up = max(first + rest, 0), down = max(-(first + rest), 0);
    const float scaled = squares * power(rest) * power(rest);
    // |x|^2 + epsilon, over what the row was multiplied by
    return power(-up) * rsqrt_approx(scaled * power(-up) * power(-up) +
                                     kNormEpsilon * power(-min(down, 63)) * power(-min(down, 63)));
  }
};

}  // namespace flash_kda
