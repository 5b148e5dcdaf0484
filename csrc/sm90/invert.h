// X = (diag(|k|) + L)^-1 = diag(kn) (I + L diag(kn))^-1 in place over L, with kn = 1 / |k|: rows of U carry it
// (rows.h).
//
// Two warps; each has two of the four blocks. 16 x 16 diagonal blocks by forward substitution in fp32; blocks below by
// X21 = -(X22 L21) X11, in pairs of 16 and then of 32, with tf32 operands.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr int kInvertWarps = 2;

struct Invert : Fragment {
  float (&X)[kChunk][kInverseStride];
  uint32_t warp;

  __device__ __forceinline__ Invert(SharedMemoryPlan& s, uint32_t of_two) : X(s.scratch.inverse), warp(of_two) {}

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierInvert, kInvertWarps * kWarp); }

  // Diagonal blocks 2 * warp and 2 * warp + 1; lane: a column of one.
  __device__ __forceinline__ void diagonal_blocks(const float* kn) {
    const uint32_t first = (2 * warp + lane / 16) * kBlock, column = lane % 16;
    float x[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float sums[2] = {i == column ? 1.f : 0.f, 0.f};  // two, for a shorter chain
#pragma unroll
      for (int four = 0; four < i; four += 4) {
        const float4 l = *reinterpret_cast<const float4*>(&X[first + i][first + four]);
        const float of[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
        for (int m = 0; m < 4; ++m)
          if (four + m < i) sums[m % 2] = fmaf(-of[m], x[four + m], sums[m % 2]);
      }
      x[i] = kn[first + i] * (sums[0] + sums[1]);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBlock; ++i) X[first + i][first + column] = rounded_to_tf32(x[i]);
    __syncwarp();
  }

  // Fragments of 8 columns (left) or 8 rows (right). Both sum over pairs of columns in the order of accumulators, so
  // that those are left operands as they are: columns 2t and 2t + 1 where the instruction has t and t + 4.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int I, int J, int octet) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 x = *reinterpret_cast<const float2*>(&X[I * kBlock + row + 8 * r][J * kBlock + 8 * octet + 2 * t]);
      a[r] = __float_as_uint(x.x), a[2 + r] = __float_as_uint(x.y);
    }
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], int eight, int J, int octet) const {
#pragma unroll
    for (int x = 0; x < 2; ++x) b[x] = __float_as_uint(X[8 * eight + 2 * t + x][J * kBlock + 8 * octet + row]);
  }

  static __device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[4]) {
    a[0] = tf32(c[0]);
    a[1] = tf32(c[2]);
    a[2] = tf32(c[1]);
    a[3] = tf32(c[3]);
  }

  __device__ __forceinline__ void store(int I, int J, int octet, const float (&c)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      *reinterpret_cast<float2*>(&X[I * kBlock + row + 8 * r][J * kBlock + 8 * octet + 2 * t]) = {
          rounded_to_tf32(-c[2 * r]), rounded_to_tf32(-c[2 * r + 1])};
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
#pragma unroll 1
    for (int K = 2; K <= I; ++K) {
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
        left(a, I, K, octet);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          right(b, 2 * K + octet, n / 2, n % 2);
          mma_tf32(product[n], a, b[0], b[1], true);
        }
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

  __device__ __forceinline__ void run(const float* kn) {
    diagonal_blocks(kn);
    pair_of_16();
    sync();
    recompute();
    pair_of_32();
  }
};

}  // namespace flash_kda
