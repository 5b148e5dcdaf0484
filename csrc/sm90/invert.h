// X = (diag(|k|) + L)^-1 = diag(kn) (I + L diag(kn))^-1 in place over L, with kn = 1 / |k|: rows of U carry it
// (rows.h).
//
// Then X b, as the operand it is. Two warps; each has two of the four blocks. 16 x 16 diagonal blocks by forward substitution in fp32; blocks below by
// X21 = -(X22 L21) X11, in pairs of 16 and then of 32, with tf32 operands.
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
  uint32_t warp;
  Triangles& x;

  __device__ __forceinline__ Invert(SharedMemoryPlan& plan, int of_cluster)
      : s(plan), rank(of_cluster), warp(threadIdx.x / kWarp - kFirstInvertWarp), x(plan.triangles[kOwn]) {}

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierInvert, kInvertWarps * kWarp); }

  // Diagonal blocks 2 * warp and 2 * warp + 1; lane: a column of one. Forward substitution, eight rows at a time.
  __device__ __forceinline__ void diagonal_blocks(const float* kn) {
    const uint32_t J = 2 * warp + lane / 16, column = lane % 16;
    const uint32_t block = warp * kTileBytes + J * kBlock * 128, side = lane / 16 * 4;
    uint32_t from = block + triangle_place(0, side, 0), to = block + triangle_place(0, side + column / 4, column % 4);
    kn += J * kBlock;
    float upper[8];
#pragma unroll 1
    for (uint32_t half = 0; half < 2; ++half) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = int(8 * half) + i == int(column) ? 1.f : 0.f;
      if (half == 1) {
#pragma unroll
        for (int i = 0; i < 8; ++i) subtract<8>(y[i], upper, from, i, 0);
      }
      const uint32_t own = from ^ half * 32;  // columns 8 * half ..
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i > 0) subtract<8>(y[i], y, own, i, i);
        y[i] *= kn[i];
      }
      __syncwarp();  // the rows are read
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        triangle<float>(x, to, 0, i, 0, 0) = rounded_to_tf32(y[i]);
        upper[i] = y[i];
      }
      from += 8 * 128, to += 8 * 128, kn += 8;
    }
    __syncwarp();
  }

  // sum -= l . y over the first `count` of eight columns, where `from` names those of row 0 and l is row i; all if 0.
  template <int kColumns>
  __device__ __forceinline__ void subtract(float& sum, const float (&y)[kColumns], uint32_t from, int i,
                                           int count) const {
    float odd = 0.f;  // two sums, for a shorter chain
#pragma unroll
    for (int four = 0; four < (count ? count : kColumns); four += 4) {
      const float4 l = triangle<float4>(x, from, 0, i, 0, four / 4);
      const float of[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
      for (int m = 0; m < 4; ++m)
        if (four + m < (count ? count : kColumns)) {
          if (m % 2)
            odd = fmaf(-of[m], y[four + m], odd);
          else
            sum = fmaf(-of[m], y[four + m], sum);
        }
    }
    sum += odd;
  }

  // Fragments of 8 columns (left) or 8 rows (right). Both sum over pairs of columns in the order of accumulators, so
  // that those are left operands as they are: columns 2t and 2t + 1 where the instruction has t and t + 4.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int I, int J, int octet) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 y = triangle<float2>(x, triangle_place(row, t / 2, t % 2 * 2), I, 8 * r, J, 2 * octet);
      a[r] = __float_as_uint(y.x), a[2 + r] = __float_as_uint(y.y);
    }
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], int eight, int J, int octet) const {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      b[odd] = __float_as_uint(triangle<float>(x, triangle_place(2 * t, row / 4, row % 4), eight / 2,
                                               eight % 2 * 8 + odd, J, 2 * octet));
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
      triangle<float2>(x, triangle_place(row, t / 2, t % 2 * 2), I, 8 * r, J, 2 * octet) = {
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
    for (int k = 4; k < 2 * (I + 1); ++k) {  // eight columns of X22
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

  // X b as the sum of two numbers of bf16, in place. A row at a time: eight lanes, eight columns each.
  __device__ __forceinline__ void split(const float* b) const {
    const uint32_t unit = lane % 8;
    const float4 b_first = *reinterpret_cast<const float4*>(b + 8 * unit),
                 b_second = *reinterpret_cast<const float4*>(b + 8 * unit + 4);
    const float factor[8] = {b_first.x,  b_first.y,  b_first.z,  b_first.w,
                             b_second.x, b_second.y, b_second.z, b_second.w};
#pragma unroll 1
    for (uint32_t i = 32 * warp + lane / 8; i < 32 * (warp + 1); i += 4) {
      const bool below = unit / 2 <= i / kBlock;  // blocks above the diagonal are zero
      const uint32_t from = unit / 4 * kTileBytes + triangle_place(i, 2 * (unit % 4), 0);
      uint4 high, low;
      uint32_t* const of[2] = {&high.x, &low.x};
#pragma unroll
      for (int four = 0; four < 2; ++four) {
        const float4 y = triangle<float4>(x, from, 0, 0, 0, four);
        const float z[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int m = 4 * four + 2 * pair;
          const float2 product = {below ? z[2 * pair] * factor[m] : 0.f,
                                  below ? z[2 * pair + 1] * factor[m + 1] : 0.f};
          const uint32_t rounded = pack_bf16(product.x, product.y);
          const float2 taken = unpack_bf16(rounded);
          of[0][2 * four + pair] = rounded;
          of[1][2 * four + pair] = pack_bf16(product.x - taken.x, product.y - taken.y);
        }
      }
      __syncwarp();  // the row is read
      const int place = swizzled(i, unit);
      *reinterpret_cast<uint4*>(x.X_high.bytes + place) = high;
      *reinterpret_cast<uint4*>(x.X_low.bytes + place) = low;
    }
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      mark(Stage::kWaitChunk, c);
      Barrier::wait(&s.bar_loaded[own.stage], own.parity);
      recompute(), forget(warp);
      if (s.own[own.stage].valid == Chunk::kEnd) break;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_L_ready, n % 2);
      mark(Stage::kInvert, c);
      diagonal_blocks(s.kn[own.stage]);
      pair_of_16();
      sync();
      recompute();
      pair_of_32();
      sync();
      mark(Stage::kSplit, c);
      split(s.b[own.stage]);
      warp_arrive(&s.bar_X_ready);
      mark(Stage::kCopy, c);
      if (warp == 0 && lane == 0) copy_chunk(s, n);
      __syncwarp();
    }
  }
};

}  // namespace flash_kda
