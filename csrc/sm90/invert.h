// X = (diag(|k|) + L)^-1 = diag(kn) (I + L diag(kn))^-1 in place over L, with kn = 1 / |k|: rows of U carry it
// (rows.h).
//
// A warp for each team of P. 16 x 16 diagonal blocks by forward substitution in fp32; the block below by
// X21 = -(X22 L21) X11, with tf32 operands.
#pragma once

#include "fragment.h"
#include "pair.h"
#include "plan.h"
#include "ptx.h"
#include "timeline.h"
#include "triangle.h"

namespace flash_kda {

struct Invert : Fragment {
  SharedMemoryPlan& s;
  int rank;
  uint32_t team;

  __device__ __forceinline__ Invert(SharedMemoryPlan& plan, int of_cluster)
      : s(plan), rank(of_cluster), team(threadIdx.x / kWarp - kFirstInvertWarp) {}

  // Both diagonal blocks; lane: a column of one. Forward substitution, four rows at a time: rolled up, for the size of the
  // code, with what has been solved read from where it was stored.
  __device__ __forceinline__ void diagonal_blocks(Tile& x, const float* kn) const {
    const uint32_t J = lane / 16, column = lane % 16;
    kn += J * kBlock;
#pragma unroll 1
    for (uint32_t r = 0; r < kBlock / 4; ++r) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = 4 * r + i == column ? 1.f : 0.f;
#pragma unroll 1
      for (uint32_t g = 0; g < r; ++g) {
        float solved[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) solved[m] = of_four<float>(x, four_rows(J, g, column / 4, column % 4), m);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 l = of_four<float4>(x, four_rows(J, r, g, 0), i);
          y[i] = fmaf(-l.x, solved[0], y[i]), y[i] = fmaf(-l.y, solved[1], y[i]);
          y[i] = fmaf(-l.z, solved[2], y[i]), y[i] = fmaf(-l.w, solved[3], y[i]);
        }
      }
      const uint32_t own = four_rows(J, r, r, 0);
      const float4 factor = *reinterpret_cast<const float4*>(kn + 4 * r);
      const float4 l1 = of_four<float4>(x, own, 1), l2 = of_four<float4>(x, own, 2), l3 = of_four<float4>(x, own, 3);
      y[0] *= factor.x;
      y[1] = factor.y * fmaf(-l1.x, y[0], y[1]);
      y[2] = factor.z * fmaf(-l2.y, y[1], fmaf(-l2.x, y[0], y[2]));
      y[3] = factor.w * fmaf(-l3.z, y[2], fmaf(-l3.y, y[1], fmaf(-l3.x, y[0], y[3])));
      __syncwarp();  // the rows are read
#pragma unroll
      for (int i = 0; i < 4; ++i) of_four<float>(x, four_rows(J, r, column / 4, column % 4), i) = y[i];
    }
#pragma unroll 1
    for (uint32_t r = 0; r < kBlock / 4; ++r)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& y = of_four<float>(x, four_rows(J, r, column / 4, column % 4), i);
        y = rounded_to_tf32(y);
      }
    __syncwarp();
  }

  // The place of row 4 * r of the diagonal block J, unit `unit` of that block; and row i of those four.
  static __device__ __forceinline__ uint32_t four_rows(uint32_t J, uint32_t r, uint32_t unit, uint32_t word) {
    return (J * kBlock + 4 * r) * 128 + ((4 * J + unit) ^ 4 * (r & 1)) * 16 + word * 4;
  }
  template <class T>
  static __device__ __forceinline__ T& of_four(Tile& x, uint32_t place, int i) {
    return *reinterpret_cast<T*>(x.bytes + (place ^ i * 16) + i * 128);
  }

  // Fragments of 8 columns (left) or 8 rows (right) of a block. Both sum over pairs of columns in the order of
  // accumulators, so that those are left operands as they are: columns 2t and 2t + 1 where the instruction has t and
  // t + 4.
  __device__ __forceinline__ void left(uint32_t (&a)[4], Tile& x, int I, int J, int octet) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 y = triangle<float2>(x, triangle_place(row, t / 2, t % 2 * 2), I, 8 * r, J, 2 * octet);
      a[r] = __float_as_uint(y.x), a[2 + r] = __float_as_uint(y.y);
    }
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], Tile& x, int I, int eight, int J, int octet) const {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      b[odd] = __float_as_uint(
          triangle<float>(x, triangle_place(2 * t, row / 4, row % 4), I, eight * 8 + odd, J, 2 * octet));
  }

  static __device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[4]) {
    a[0] = tf32(c[0]);
    a[1] = tf32(c[2]);
    a[2] = tf32(c[1]);
    a[3] = tf32(c[3]);
  }

  // Block (1, 0).
  __device__ __forceinline__ void below(Tile& x) const {
    float product[2][4], result[2][4];
    uint32_t a[4], b[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      left(a, x, 1, 1, k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, x, 1, k, 0, n);
        mma_tf32(product[n], a, b[0], b[1], k > 0);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      as_left(a, product[k]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, x, 0, k, 0, n);
        mma_tf32(result[n], a, b[0], b[1], k > 0);
      }
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        triangle<float2>(x, triangle_place(row, t / 2, t % 2 * 2), 1, 8 * r, 0, 2 * n) = {
            rounded_to_tf32(-result[n][2 * r]), rounded_to_tf32(-result[n][2 * r + 1])};
    __syncwarp();
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = team;; n += kTeams) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      mark(Stage::kWaitChunk, c);
      Barrier::wait(&s.bar_loaded[own.stage], own.parity);
      recompute();
      if (s.own[own.stage].valid == Chunk::kEnd) break;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_L_ready[own.stage], own.parity);
      mark(Stage::kInvert, c);
      Tile& x = s.operands[own.stage].X;
      diagonal_blocks(x, s.kn[own.stage]);
      below(x);
      warp_arrive(&s.bar_X_ready[own.stage]);
      mark(Stage::kCopy, c);
      if (lane == 0) copy_chunk(s, n);
      __syncwarp();
    }
  }
};

}  // namespace flash_kda
