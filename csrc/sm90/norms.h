// Norms of rows of q and k.
//
// P works with the rows as they are. What normalising them comes to is multiplied into results: 1 / |q| into the
// output; 1 / |k| into K~, into the rows of L, and into the rows of X, since a row of U is only ever used times its k^.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr float kNormEpsilon = 1e-6f;
constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32

// One warp, with 64 channels of the 16 rows of a block, which begin at `rows`.
struct Norms : Fragment {
  // Rows past the end of the sequence hold what comes after it: they get x, two numbers of bf16.
  __device__ __forceinline__ void clear_rows(unsigned char* rows, int from, uint32_t x) const {
    for (int i = max(from, 0) + lane / 8; i < kBlock; i += 4)
      *reinterpret_cast<uint4*>(rows + i * 128 + lane % 8 * 16) = {x, x, x, x};
    __syncwarp();
  }

  // The sums of squares of rows `row` and `row + 8`: the diagonal of x x^T.
  __device__ __forceinline__ void row_squares(const unsigned char* rows, float (&squares)[2]) const {
    const uint32_t place = swizzled(matrix_row(), matrix_unit());
    // Eight channels at a time: then a register of the left operand is the right operand as it is.
    float c[2][2][4] = {};  // [even or odd eights][rows 0..7, rows 8..15]: short chains of sums
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      uint32_t a[4];
      load_matrices(a, rows + (place ^ k << 5));
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        mma_bf16_8(c[eight][0], a[2 * eight], a[2 * eight + 1], a[2 * eight]);
        mma_bf16_8(c[eight][1], a[2 * eight], a[2 * eight + 1], a[2 * eight + 1]);
      }
    }
    // The diagonal lies in the lanes of t = row / 2; all lanes of a row get it.
    const int source = row * 4 + row / 2;
    const float (&even)[2][4] = c[0], (&odd)[2][4] = c[1];
    squares[0] = __shfl_sync(~0u, row & 1 ? even[0][1] + odd[0][1] : even[0][0] + odd[0][0], source);
    squares[1] = __shfl_sync(~0u, row & 1 ? even[1][3] + odd[1][3] : even[1][2] + odd[1][2], source);
  }

  __device__ __forceinline__ void scale_rows(unsigned char* rows, const int (&exponent)[2]) const {
    const float factor[2] = {power(exponent[0]), power(exponent[1])};
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {
      unsigned char* place = rows + swizzled(matrix_row(), 2 * k + matrix_unit());
      uint32_t a[4];
      load_matrices(a, place);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 y = unpack_bf16(a[i]);
        a[i] = pack_bf16(y.x * factor[i % 2], y.y * factor[i % 2]);
      }
      store_matrices(place, a);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ float power(int exponent) {
    return __uint_as_float(uint32_t(127 + exponent) << 23);
  }

  // 1 / |x| of rows with norms far from 1, which are multiplied by a power of two first, so that their products with
  // decays stay in range. `squares`: of all channels. `square_again()` gives them once more, of the rows as they are
  // then.
  template <class SquareAgain>
  __device__ __forceinline__ void unusual_norms(unsigned char* rows, const float (&raw)[2], const bool (&ordinary)[2],
                                                const SquareAgain& square_again, float (&inverse)[2]) const {
    int first[2], rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) first[r] = raw[r] < 0x1p-60f ? 72 : (raw[r] < 0x1p120f ? 0 : -72);
    scale_rows(rows, first);
    float squares[2];
    square_again(squares);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int exponent = int(__float_as_uint(squares[r]) >> 23) - 127;
      rest[r] = ordinary[r] || squares[r] == 0.f ? 0 : min(-(exponent >> 1), kMaxRise - first[r]);
    }
    scale_rows(rows, rest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (ordinary[r]) continue;
      if (squares[r] == 0.f) {  // nothing: not even a large factor of zero, which values might overflow with
        inverse[r] = 0.f;
        continue;
      }
      const int up = max(first[r] + rest[r], 0), down = max(-(first[r] + rest[r]), 0);
      const float scaled = squares[r] * power(rest[r]) * power(rest[r]);
      // |x|^2 + epsilon, over what the row was multiplied by
      inverse[r] = power(-up) * rsqrt_approx(scaled * power(-up) * power(-up) +
                                             kNormEpsilon * power(-min(down, 63)) * power(-min(down, 63)));
    }
  }
};

}  // namespace flash_kda
