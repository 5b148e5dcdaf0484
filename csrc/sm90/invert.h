// Norms of rows, and X = (diag(|k|) + L)^-1 = diag(1 / |k|) (I + L / |k|)^-1 in place over L.
//
// P works with rows of q and k as they are. What normalising them comes to is multiplied into results: 1 / |q| into the
// output, and 1 / |k| of a row into L and W, of a column into X, since U_j = k^_j ... is used as a column alone.
//
// Two warps; each has two of the four blocks. 16 x 16 diagonal blocks by forward substitution in fp32; blocks below by
// X21 = -(X22 L21) X11, in pairs of 16 and then of 32, with tf32 operands.
#pragma once

#include "plan.h"
#include "prepare.h"
#include "ptx.h"

namespace flash_kda {

constexpr float kNormEpsilon = 1e-6f;
constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32

struct Invert {
  const Params& p;
  SharedMemoryPlan& s;
  int warp, lane, row, t;

  __device__ __forceinline__ Invert(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    warp = threadIdx.x / kWarp % 2;
    lane = threadIdx.x % kWarp;
    row = lane / 4;
    t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierInvert, kInvertThreads); }

  // Norms -------------------------------------------------------------------------------------------------------------

  // Rows past the end of the sequence hold what comes after it: clear them. No decay follows from a gate of -inf.
  __device__ __forceinline__ void clear_rows(Slot& slot, int valid) const {
    const int rows = 2 * kBlock, first = warp * rows;
    for (int i = max(valid, first); i < first + rows; ++i) {
      for (int unit = lane; unit < 3 * 16; unit += kWarp) {
        const int tensor = unit / 16;
        Tile* tiles = tensor == 0 ? slot.q : tensor == 1 ? slot.k : slot.g;
        const uint32_t x = tensor == 2 ? 0xff80ff80u : 0u;
        *reinterpret_cast<uint4*>(tiles[unit / 8 % 2].bytes + i * 128 + unit % 8 * 16) = {x, x, x, x};
      }
    }
    __syncwarp();
  }

  // The sum of squares of rows `row` and `row + 8` of a block: the diagonal of x x^T.
  __device__ __forceinline__ void row_squares(const Tile* x, int block, float (&squares)[2]) const {
    float c0[4], c1[4];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t a[4];
      load_matrices(a, x[k / 4].bytes + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16));
      mma_bf16(c0, a, a[0], a[2], k > 0);
      mma_bf16(c1, a, a[1], a[3], k > 0);
    }
    // The diagonal lies in the lanes of t = row / 2; all lanes of a row get it.
    const int source = row * 4 + row / 2;
    squares[0] = __shfl_sync(~0u, row & 1 ? c0[1] : c0[0], source);
    squares[1] = __shfl_sync(~0u, row & 1 ? c1[3] : c1[2], source);
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

  // 1 / |x| of rows `row` and `row + 8`. Rows with a norm far from 1 are multiplied by a power of two first, so that
  // their products with decays stay in range.
  __device__ __forceinline__ void norms(Tile* x, int block, float (&inverse)[2]) const {
    float squares[2];
    row_squares(x, block, squares);
    bool ordinary[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ordinary[r] = squares[r] >= 0x1p-16f && squares[r] <= 0x1p16f;
      inverse[r] = rsqrt_approx(squares[r] + kNormEpsilon);
    }
    if (!__all_sync(~0u, ordinary[0] && ordinary[1])) unusual_norms(x, block, squares, ordinary, inverse);
  }

  __device__ __forceinline__ void unusual_norms(Tile* x, int block, float (&squares)[2], const bool (&ordinary)[2],
                                                float (&inverse)[2]) const {
    int first[2], rest[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) first[r] = squares[r] < 0x1p-60f ? 72 : (squares[r] < 0x1p120f ? 0 : -72);
    scale_rows(x, block, first);
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

  // What rows of the chunk are multiplied by; lane: a token of the warp's 32.
  __device__ __forceinline__ void rows(int stage, int parity) {
    TransactionBarrier::wait(&s.bar_qkg_loaded[stage], parity);
    const Chunk& at = s.own[stage];
    if (at.valid == Chunk::kEnd) return;
    const int token = warp * kWarp + lane;
    float logit = -INFINITY;
    if (token < at.valid)
      logit = unpack_bf16(p.beta[at.batch * p.beta_stride_batch + (at.token + token) * p.beta_stride_token +
                                 at.head * p.beta_stride_head])
                  .x;
    Slot& slot = s.slots[stage];
    Factors& f = s.factors[stage];
    if (at.valid < kChunk) clear_rows(slot, at.valid);
#pragma unroll 1
    for (int block = 2 * warp; block < 2 * warp + 2; ++block) {
      float q[2], k[2];
      norms(slot.q, block, q);
      norms(slot.k, block, k);
      if (t == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          f.q[block * kBlock + row + 8 * r] = p.scale * q[r];
          s.k_factor[stage][block * kBlock + row + 8 * r] = k[r];
        }
      }
    }
    __syncwarp();
    const float b = reciprocal_approx(1.f + exp2_approx(-kLog2E * logit));
    f.b[token] = b;
    f.bk[token] = b * s.k_factor[stage][token];
    warp_arrive(&s.bar_rows_ready[stage]);
  }

  // X -----------------------------------------------------------------------------------------------------------------

  // Diagonal blocks 2 * warp and 2 * warp + 1; lane: a column of one.
  __device__ __forceinline__ void diagonal_blocks(const float* k_factor) {
    const int J = 2 * warp + lane / 16, column = lane % 16, first = J * kBlock;
    float x[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float even = i == column ? 1.f : 0.f, odd = 0.f;
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          if (8 * octet + parity >= i) continue;
          const float4 l = *reinterpret_cast<const float4*>(&triangle(s.X[0], J, i, J, octet, parity, 0));
          const float of[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const int m = 8 * octet + 2 * n + parity;
            if (m >= i) continue;
            if (parity == 0)
              even = fmaf(-of[n], x[m], even);
            else
              odd = fmaf(-of[n], x[m], odd);
          }
        }
      }
      x[i] = k_factor[first + i] * (even + odd);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      triangle(s.X[0], J, i, J, column / 8, column % 2, (column % 8) / 2) = __uint_as_float(tf32(x[i]));
    __syncwarp();
  }

  // Fragments of 8 columns (left) or 8 rows (right) of what is stored. Left: rows of block I. Right: rows 8 * eight ..
  __device__ __forceinline__ void left(uint32_t (&a)[4], int I, int J, int octet) const {
#pragma unroll
    for (int x = 0; x < 4; ++x) a[x] = __float_as_uint(triangle(s.X[0], I, row + 8 * (x % 2), J, octet, x / 2, t));
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], int eight, int J, int octet) const {
#pragma unroll
    for (int x = 0; x < 2; ++x)
      b[x] = __float_as_uint(triangle(s.X[0], eight / 2, eight % 2 * 8 + 2 * t + x, J, octet, row % 2, row / 2));
  }

  static __device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[4]) {
    a[0] = tf32(c[0]);
    a[1] = tf32(c[2]);
    a[2] = tf32(c[1]);
    a[3] = tf32(c[3]);
  }

  __device__ __forceinline__ void store(int I, int J, int octet, const float (&c)[4]) {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      triangle(s.X[0], I, row + 8 * (x / 2), J, octet, x % 2, t) = __uint_as_float(tf32(-c[x]));
  }

  // Block (1, 0) or (3, 2).
  __device__ __forceinline__ void pair_of_16() {
    const int upper = 2 * warp, lower = upper + 1;
    float product[2][4], result[2][4];
    uint32_t a[4], b[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      left(a, lower, lower, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, 2 * lower + k, upper, n);
        mma_tf32(product[n], a, b[0], b[1], k > 0);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      as_left(a, product[k]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, 2 * upper + k, upper, n);
        mma_tf32(result[n], a, b[0], b[1], k > 0);
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 2; ++n) store(lower, upper, n, result[n]);
  }

  // Blocks (2, 0..1) or (3, 0..1).
  __device__ __forceinline__ void pair_of_32() {
    const int I = 2 + warp;
    float product[4][4] = {}, result[4][4];
    uint32_t a[4], b[2];
#pragma unroll 1  // unrolled, it takes more registers than there are
    for (int k = 4; k < 2 * I + 2; ++k) {
      left(a, I, k / 2, k % 2);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        right(b, k, n / 2, n % 2);
        mma_tf32(product[n], a, b[0], b[1], true);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      as_left(a, product[k]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (n / 2 > k / 2) continue;  // above the diagonal
        right(b, k, n / 2, n % 2);
        mma_tf32(result[n], a, b[0], b[1], k > n / 2 * 2);
      }
    }
    sync();  // L21 is read
#pragma unroll
    for (int n = 0; n < 4; ++n) store(I, n / 2, n % 2, result[n]);
  }

  __device__ __forceinline__ void run() {
    rows(0, 0);
    for (int n = 0;; ++n) {  // own chunks
      forget(warp), forget(lane);
      row = lane / 4, t = lane % 4;
      if (s.own[n % 2].valid == Chunk::kEnd) break;
      rows((n + 1) % 2, (n + 1) / 2 % 2);  // of the next chunk first: P may wait for it
      Barrier::wait(&s.bar_LM_ready, n % 2);
      diagonal_blocks(s.k_factor[n % 2]);
      pair_of_16();
      sync();
      forget(row), forget(t);
      pair_of_32();
      cutlass::arch::fence_view_async_shared();
      sync();
      if (lane == 0) {
        Barrier::arrive(&s.bar_X_ready);
        if (warp == 0)
          send(&s.X[0], &s.X[1], sizeof(Triangle), &s.bar_X_received);
        else
          send(&s.M[0], &s.M[1], sizeof(Tile), &s.bar_X_received);
      }
    }
  }
};

}  // namespace flash_kda
