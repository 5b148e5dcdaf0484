// X = (diag(|k|) + L)^-1 = diag(kn) (I + L diag(kn))^-1 in place over L, with kn = 1 / |k|: rows of U carry it
// (norms.h).
//
// Two warps; each has two of the four blocks. 16 x 16 diagonal blocks by forward substitution in fp32; blocks below by
// X21 = -(X22 L21) X11, in pairs of 16 and then of 32, with tf32 operands.
#pragma once

#include "plan.h"
#include "prepare.h"
#include "ptx.h"

namespace flash_kda {

struct Invert {
  SharedMemoryPlan& s;
  uint32_t warp, lane, row, t;

  __device__ __forceinline__ explicit Invert(SharedMemoryPlan& plan) : s(plan) {
    warp = threadIdx.x / kWarp - kFirstInvertWarp;
    lane = threadIdx.x % kWarp;
    row = lane / 4;
    t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierInvert, kInvertWarps * kWarp); }

  // Diagonal blocks 2 * warp and 2 * warp + 1; lane: a column of one.
  __device__ __forceinline__ void diagonal_blocks(const float* kn) {
    const uint32_t J = 2 * warp + lane / 16, column = lane % 16, first = J * kBlock;
    // Of blocks (J, J): their rows of 16, in the right half of their tile where J is odd
    const uint32_t block = warp * kRightTile + J * (kBlock * 128), right_half = (J & 1) * 4;
    const uint32_t from = block + triangle_place(0, right_half, 0);
    const uint32_t to = block + triangle_place(0, right_half + column / 8 * 2 + column % 2, column % 8 / 2);
    float x[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float even = i == column ? 1.f : 0.f, odd = 0.f;
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          if (8 * octet + parity >= i) continue;
          const float4 l = *reinterpret_cast<const float4*>(&triangle(s.X[kOwn], from, 0, i, 0, 2 * octet + parity));
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
      x[i] = kn[first + i] * (even + odd);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kBlock; ++i) triangle(s.X[kOwn], to, 0, i, 0, 0) = __uint_as_float(tf32(x[i]));
    __syncwarp();
  }

  // Fragments of 8 columns (left) or 8 rows (right) of what is stored. Left: rows of block I. Right: rows 8 * eight ..
  __device__ __forceinline__ void left(uint32_t (&a)[4], int I, int J, int octet) const {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      a[x] = __float_as_uint(triangle(s.X[kOwn], triangle_place(row, 0, t), I, x % 2 * 8, J, 2 * octet + x / 2));
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], int eight, int J, int octet) const {
#pragma unroll
    for (int x = 0; x < 2; ++x)
      b[x] = __float_as_uint(
          triangle(s.X[kOwn], triangle_place(2 * t, row % 2, row / 2), eight / 2, eight % 2 * 8 + x, J, 2 * octet));
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
      triangle(s.X[kOwn], triangle_place(row, 0, t), I, x / 2 * 8, J, 2 * octet + x % 2) = __uint_as_float(tf32(-c[x]));
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

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      Barrier::wait(&s.bar_qkg_loaded[own.stage], own.parity);
      forget(warp), forget(lane);
      row = lane / 4, t = lane % 4;
      if (s.own[own.stage].valid == Chunk::kEnd) break;
      Barrier::wait(&s.bar_LM_ready, n % 2);
      if (warp == 0 && lane == 0) send(&s.M[kOwn], &s.M[kReceived], sizeof(Tile), &s.bar_X_received);
      diagonal_blocks(s.kn[own.stage]);
      pair_of_16();
      sync();
      forget(row), forget(t);
      pair_of_32();
      fence_async();
      sync();
      if (lane == 0) {
        Barrier::arrive(&s.bar_X_ready);
        if (warp == 0) send(&s.X[kOwn], &s.X[kReceived], sizeof(Triangle), &s.bar_X_received);
      }
    }
  }
};

}  // namespace flash_kda
