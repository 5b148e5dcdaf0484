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

  // Where a lane finds eight rows of its diagonal block, and eight columns in them, the "own" ones. The swizzle XORs the
  // 16-byte unit with the row: what the lane and the loop decide of the unit is in one of four places, and the rest is an
  // offset that the compiler knows.
  struct Rows {
    uint32_t place[4];

    // Row i, columns 4 * (unit % 2) .. of the own ones, or of the eight before them.
    __device__ __forceinline__ const float4& at(const Tile& x, int i, int unit, bool before) const {
      const int swizzle = (unit ^ (i & 7)) ^ (before ? 2 : 0);
      return *reinterpret_cast<const float4*>(x.bytes + place[swizzle >> 1] + i * 128 + (swizzle & 1) * 16);
    }
  };

  // Both diagonal blocks; lane: a column of one. Forward substitution, eight rows at a time.
  __device__ __forceinline__ void diagonal_blocks(Tile& x, const float* kn) const {
    const uint32_t J = lane / 16, column = lane % 16;
    Rows rows;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) rows.place[i] = J * kBlock * 128 + (i ^ 2 * J) * 32;
    uint32_t to = J * kBlock * 128 + triangle_place(0, J * 4 + column / 4, column % 4);
    kn += J * kBlock;
    float upper[8];
#pragma unroll 1
    for (uint32_t half = 0; half < 2; ++half) {
      float y[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] = 8 * half + i == column ? 1.f : 0.f;
      if (half == 1) {
#pragma unroll
        for (int i = 0; i < 8; ++i) subtract<8>(y[i], x, upper, rows, i, true);
      }
      y[0] *= kn[0];
      eliminate<1>(y, x, kn, rows);
      __syncwarp();  // the rows are read
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        triangle<float>(x, to, 0, i, 0, 0) = rounded_to_tf32(y[i]);
        upper[i] = y[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.place[i] = (rows.place[i] ^ 32) + 8 * 128;
      to += 8 * 128, kn += 8;
    }
    __syncwarp();
  }

  // Rows kRow .. of eight, after those before.
  template <int kRow>
  static __device__ __forceinline__ void eliminate(float (&y)[8], const Tile& x, const float* kn, const Rows& rows) {
    if constexpr (kRow < 8) {
      subtract<kRow>(y[kRow], x, y, rows, kRow, false);
      y[kRow] *= kn[kRow];
      eliminate<kRow + 1>(y, x, kn, rows);
    }
  }

  // sum -= l . y over the first `kCount` of eight columns of row i.
  template <int kCount>
  static __device__ __forceinline__ void subtract(float& sum, const Tile& x, const float (&y)[8], const Rows& rows, int i,
                                                  bool before) {
    float odd = 0.f;  // two sums, for a shorter chain
#pragma unroll
    for (int four = 0; four < kCount; four += 4) {
      const float4 l = rows.at(x, i, four / 4, before);
      const float of[4] = {l.x, l.y, l.z, l.w};
#pragma unroll
      for (int m = 0; m < 4 && four + m < kCount; ++m) {
        float& part = m % 2 ? odd : sum;
        part = fmaf(-of[m], y[four + m], part);
      }
    }
    sum += odd;
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
