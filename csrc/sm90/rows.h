// Norms of rows of q and k, and beta.
//
// P works with the rows as they are. What normalising them comes to is multiplied into results: 1 / |q| into the
// output; 1 / |k| into K~, into the rows of L, and into the rows of X, since a row of U is only ever used times its k^.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"
#include "timeline.h"

namespace flash_kda {

constexpr float kNormEpsilon = 1e-6f;
constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32

// One warp.
struct Norms : Fragment {
  // The tile of one half of the channels, given that of the first one.
  static __device__ __forceinline__ unsigned char* half_of(Tile& x, int half) {
    return x.bytes + half * int(sizeof(Operands::of[0]));
  }
  static __device__ __forceinline__ const unsigned char* half_of(const Tile& x, int half) {
    return x.bytes + half * int(sizeof(Operands::of[0]));
  }

  // Rows past the end of the sequence hold what comes after it: they get x, two numbers of bf16.
  __device__ __forceinline__ void clear_rows(Tile& tile, int valid, uint32_t x) const {
    const uint32_t unit = lane % 16;
    for (uint32_t i = valid + lane / 16; i < kChunk; i += 2)
      *reinterpret_cast<uint4*>(half_of(tile, unit / 8) + i * 128 + unit % 8 * 16) = {x, x, x, x};
    __syncwarp();
  }

  // The sums of squares of rows `row` and `row + 8` of a block: the diagonal of x x^T.
  __device__ __forceinline__ void row_squares(const Tile& x, int block, float (&squares)[2]) const {
    const uint32_t place = swizzled(block * kBlock + matrix_row(), matrix_unit());
    // Eight channels at a time: then a register of the left operand is the right operand as it is.
    float c[2][2][4] = {};  // [even or odd eights][rows 0..7, rows 8..15]: short chains of sums
#pragma unroll 1            // for the size of the code
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        uint32_t a[4];
        load_matrices(a, half_of(x, half) + (place ^ k << 5));
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          mma_bf16_8(c[eight][0], a[2 * eight], a[2 * eight + 1], a[2 * eight]);
          mma_bf16_8(c[eight][1], a[2 * eight], a[2 * eight + 1], a[2 * eight + 1]);
        }
      }
    }
    // The diagonal lies in the lanes of t = row / 2; all lanes of a row get it.
    const int source = row * 4 + row / 2;
    const float (&even)[2][4] = c[0], (&odd)[2][4] = c[1];
    squares[0] = __shfl_sync(~0u, row & 1 ? even[0][1] + odd[0][1] : even[0][0] + odd[0][0], source);
    squares[1] = __shfl_sync(~0u, row & 1 ? even[1][3] + odd[1][3] : even[1][2] + odd[1][2], source);
  }

  __device__ __forceinline__ void scale_rows(Tile& x, int block, const int (&exponent)[2]) const {
    const float factor[2] = {power(exponent[0]), power(exponent[1])};
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      unsigned char* place = half_of(x, k / 4) + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16);
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

  // 1 / |x| of rows `row` and `row + 8`, given their squares. Rows with a norm far from 1 are multiplied by a power of
  // two first, so that their products with decays stay in range.
  // Rows from `valid` on are zero.
  __device__ __forceinline__ void inverse_norms(Tile& x, int block, int valid, const float (&squares)[2],
                                                float (&inverse)[2]) const {
    bool ordinary[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool past = block * kBlock + int(row) + 8 * r >= valid;
      ordinary[r] = past || (squares[r] >= 0x1p-16f && squares[r] <= 0x1p16f);
      inverse[r] = past ? 0.f : rsqrt_approx(squares[r] + kNormEpsilon);
    }
    if (seldom(!__all_sync(~0u, ordinary[0] && ordinary[1]))) unusual_norms(x, block, squares, ordinary, inverse);
  }

  __device__ __forceinline__ void unusual_norms(Tile& x, int block, const float (&raw)[2], const bool (&ordinary)[2],
                                                float (&inverse)[2]) const {
    int first[2], rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) first[r] = raw[r] < 0x1p-60f ? 72 : (raw[r] < 0x1p120f ? 0 : -72);
    scale_rows(x, block, first);
    float squares[2];
    row_squares(x, block, squares);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int exponent = int(__float_as_uint(squares[r]) >> 23) - 127;
      rest[r] = ordinary[r] || squares[r] == 0.f ? 0 : min(-(exponent >> 1), kMaxRise - first[r]);
    }
    scale_rows(x, block, rest);
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

  // factor / |x_i| of each row of a tensor.
  __device__ __forceinline__ void all(Tile& x, int valid, float* to, float factor) const {
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      float squares[2], inverse[2];
      row_squares(x, block, squares);
      inverse_norms(x, block, valid, squares, inverse);
      if (t == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) to[block * kBlock + row + 8 * r] = factor * inverse[r];
      }
    }
    __syncwarp();
  }
};

// One warp: the rows of q and k of own chunks, and their beta.
struct Rows {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;

  __device__ __forceinline__ void run() const {
    Norms norms;
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      mark(Stage::kWaitChunk, c);
      Barrier::wait(&s.bar_loaded[own.stage], own.parity);
      norms.recompute();
      const Chunk at = s.own[own.stage];
      const int valid = at.valid();
      if (seldom(at.is_end())) break;
      mark(Stage::kNorms, c);
      // Asked for first: memory takes as long to answer as the norms do.
      uint32_t logit[kChunk / kWarp];
      load_beta(at, norms.lane, logit);
      Operands& x = s.operands[own.stage];
      if (seldom(valid < kChunk)) {
        norms.clear_rows(x.of[0].q, valid, 0);
        norms.clear_rows(x.of[0].k, valid, 0);
        norms.clear_rows(x.of[0].g, valid, 0xff80ff80u);  // no decay follows from a gate of -inf
      }
#pragma unroll 1
      for (int keys = 0; keys < 2; ++keys)
        norms.all(keys ? x.of[0].k : x.of[0].q, valid, keys ? s.kn[own.stage] : s.factors[own.stage].q,
                  keys ? 1.f : p.scale);
#pragma unroll
      for (int i = 0; i < kChunk / kWarp; ++i) {
        const int token = norms.lane + i * kWarp;
        const float beta = token < valid ? unpack_bf16(logit[i]).x : -INFINITY;
        s.b[own.stage][token] = reciprocal_approx(1.f + exp2_approx(-kLog2E * beta));
      }
      warp_arrive(&s.bar_rows_ready[own.stage]);
    }
  }

  __device__ __forceinline__ void load_beta(const Chunk& at, uint32_t lane, uint32_t (&logit)[kChunk / kWarp]) const {
#pragma unroll
    for (int i = 0; i < kChunk / kWarp; ++i)
      logit[i] = p.beta[at.batch(p) * p.beta_stride_batch +
                        (at.token + min(int(lane) + i * kWarp, int(at.valid()) - 1)) * p.beta_stride_token +
                        at.head * p.beta_stride_head];
  }
};

}  // namespace flash_kda
