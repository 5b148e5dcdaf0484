// Norms of rows, and what else is known of a row before anything is prepared.
//
// P works with rows of q and k as they are. What normalising them comes to is multiplied into results: 1 / |q| into the
// output, and 1 / |k| of a row into L and W, of a column into X, since U_j = k^_j ... is used as a column alone.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr float kNormEpsilon = 1e-6f;
constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32

// One warp.
struct Norms {
  const Params& p;
  SharedMemoryPlan& s;
  uint32_t lane, row, t;

  __device__ __forceinline__ Norms(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    lane = threadIdx.x % kWarp;
    row = lane / 4;
    t = lane % 4;
  }

  // Rows past the end of the sequence hold what comes after it: clear them. No decay follows from a gate of -inf.
  __device__ __forceinline__ void clear_rows(Slot& slot, int valid) const {
    for (int i = valid; i < kChunk; ++i) {
      for (int unit = lane; unit < 3 * 16; unit += kWarp) {
        const int tensor = unit / 16;
        Tile* tiles = tensor == 0 ? slot.q : tensor == 1 ? slot.k : slot.g;
        const uint32_t x = tensor == 2 ? 0xff80ff80u : 0u;
        *reinterpret_cast<uint4*>(tiles[unit / 8 % 2].bytes + i * 128 + unit % 8 * 16) = {x, x, x, x};
      }
    }
    __syncwarp();
  }

  // The sums of squares of rows `row` and `row + 8` of a block: the diagonal of x x^T.
  template <int kTensors>
  __device__ __forceinline__ void row_squares(const Tile* const (&x)[kTensors], int block,
                                              float (&squares)[kTensors][2]) const {
    float c[kTensors][2][4];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
      for (int i = 0; i < kTensors; ++i) {
        const unsigned char* tile = x[i][k / 4].bytes;
        uint32_t a[4], b[4];  // the same numbers, in the order of the left operand and of the right
        load_matrices(a, tile + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16));
        load_matrices(b, tile + swizzled(block * kBlock + lane / 16 * 8 + lane % 8, (k % 4) * 2 + lane / 8 % 2));
        mma_bf16(c[i][0], a, b[0], b[1], k > 0);
        mma_bf16(c[i][1], a, b[2], b[3], k > 0);
      }
    }
    // The diagonal lies in the lanes of t = row / 2; all lanes of a row get it.
    const int source = row * 4 + row / 2;
#pragma unroll
    for (int i = 0; i < kTensors; ++i) {
      squares[i][0] = __shfl_sync(~0u, row & 1 ? c[i][0][1] : c[i][0][0], source);
      squares[i][1] = __shfl_sync(~0u, row & 1 ? c[i][1][3] : c[i][1][2], source);
    }
  }

  __device__ __forceinline__ void scale_rows(Tile* x, int block, const int (&exponent)[2]) const {
    const float factor[2] = {power(exponent[0]), power(exponent[1])};
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      unsigned char* place = x[k / 4].bytes + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16);
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
  __device__ __forceinline__ void norms(Tile* x, int block, const float (&squares)[2], float (&inverse)[2]) const {
    bool ordinary[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ordinary[r] = squares[r] >= 0x1p-16f && squares[r] <= 0x1p16f;
      inverse[r] = rsqrt_approx(squares[r] + kNormEpsilon);
    }
    if (!__all_sync(~0u, ordinary[0] && ordinary[1])) unusual_norms(x, block, squares, ordinary, inverse);
  }

  __device__ __forceinline__ void unusual_norms(Tile* x, int block, const float (&raw)[2], const bool (&ordinary)[2],
                                                float (&inverse)[2]) const {
    int first[2], rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) first[r] = raw[r] < 0x1p-60f ? 72 : (raw[r] < 0x1p120f ? 0 : -72);
    scale_rows(x, block, first);
    const Tile* const tensors[1] = {x};
    float squares[1][2];
    row_squares(tensors, block, squares);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int exponent = int(__float_as_uint(squares[0][r]) >> 23) - 127;
      rest[r] = ordinary[r] || squares[0][r] == 0.f ? 0 : min(-(exponent >> 1), kMaxRise - first[r]);
    }
    scale_rows(x, block, rest);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (ordinary[r]) continue;
      if (squares[0][r] == 0.f) {  // nothing: not even a large factor of zero, which values might overflow with
        inverse[r] = 0.f;
        continue;
      }
      const int up = max(first[r] + rest[r], 0), down = max(-(first[r] + rest[r]), 0);
      const float scaled = squares[0][r] * power(rest[r]) * power(rest[r]);
      // |x|^2 + epsilon, over what the row was multiplied by
      inverse[r] = power(-up) * rsqrt_approx(scaled * power(-up) * power(-up) +
                                             kNormEpsilon * power(-min(down, 63)) * power(-min(down, 63)));
    }
  }

  // What rows of the n-th own chunk are multiplied by.
  __device__ __forceinline__ void rows(uint32_t n) const {
    const uint32_t stage = n % kOwnStages;
    TransactionBarrier::wait(&s.bar_qkg_loaded[stage], n / kOwnStages % 2);
    const Chunk& at = s.own[stage];
    Slot& slot = s.slots[stage];
    Factors& f = s.factors[stage];
    if (at.valid < kChunk) clear_rows(slot, at.valid);
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      const Tile* const tensors[2] = {slot.q, slot.k};
      float squares[2][2], q[2], k[2];
      row_squares(tensors, block, squares);
      norms(slot.q, block, squares[0], q);
      norms(slot.k, block, squares[1], k);
      if (t == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          f.q[block * kBlock + row + 8 * r] = p.scale * q[r];
          s.k_factor[stage][block * kBlock + row + 8 * r] = k[r];
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int token = lane; token < kChunk; token += kWarp) {
      float logit = -INFINITY;
      if (token < at.valid)
        logit = unpack_bf16(p.beta[at.batch * p.beta_stride_batch + (at.token + token) * p.beta_stride_token +
                                   at.head * p.beta_stride_head])
                    .x;
      const float b = reciprocal_approx(1.f + exp2_approx(-kLog2E * logit));
      f.b[token] = b;
      f.bk[token] = b * s.k_factor[stage][token];
    }
    warp_arrive(&s.bar_rows_ready[stage]);
  }
};

}  // namespace flash_kda
