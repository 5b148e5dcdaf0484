// X, and W = X b K~, with which a chunk is prepared.
//
// X = (diag(|k|) + L)^-1 = diag(kn) (I + L diag(kn))^-1, with kn = 1 / |k|: rows of W and U carry it (norms.h). 16 x 16
// diagonal blocks by forward substitution in fp32; the block below by X21 = -(X22 L21) X11, with tf32 operands. X b
// then is the sum of two numbers of bf16.
//
// A warp for each team of P.
#pragma once

#include "fragment.h"
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

  // Both diagonal blocks; lane: a column of one. Forward substitution, four rows at a time: rolled up, for the size of
  // the code, with what has been solved read from where it was stored.
  __device__ __forceinline__ void diagonal_blocks(Tile& x, const float* kn) const {
    const uint32_t J = lane / 16, column = lane % 16;
    kn += J * kBlock;
    const uint32_t first_of_column = J * kBlock * 128 + (4 * J + column / 4) * 16 + column % 4 * 4;
    uint32_t rows = J * kBlock * 128 + 4 * J * 16, of_column = first_of_column;  // of the four rows from 4 * r on
#pragma unroll 1
    for (uint32_t r = 0; r < kBlock / 4; ++r) {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) y[i] = 4 * r + i == column ? 1.f : 0.f;
      uint32_t before = first_of_column;
#pragma unroll 1
      for (uint32_t g = 0; g < r; ++g) {
        float solved[4];
#pragma unroll
        for (int m = 0; m < 4; ++m) solved[m] = of_four<float>(x, before, m);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 l = of_four<float4>(x, rows ^ g * 16, i);
          y[i] = fmaf(-l.x, solved[0], y[i]), y[i] = fmaf(-l.y, solved[1], y[i]);
          y[i] = fmaf(-l.z, solved[2], y[i]), y[i] = fmaf(-l.w, solved[3], y[i]);
        }
        before = next_four(before);
      }
      const uint32_t own = rows ^ r * 16;
      const float4 factor = *reinterpret_cast<const float4*>(kn + 4 * r);
      const float4 l1 = of_four<float4>(x, own, 1), l2 = of_four<float4>(x, own, 2), l3 = of_four<float4>(x, own, 3);
      y[0] *= factor.x;
      y[1] = factor.y * fmaf(-l1.x, y[0], y[1]);
      y[2] = factor.z * fmaf(-l2.y, y[1], fmaf(-l2.x, y[0], y[2]));
      y[3] = factor.w * fmaf(-l3.z, y[2], fmaf(-l3.y, y[1], fmaf(-l3.x, y[0], y[3])));
      __syncwarp();  // the rows are read
#pragma unroll
      for (int i = 0; i < 4; ++i) of_four<float>(x, of_column, i) = y[i];
      rows = next_four(rows), of_column = next_four(of_column);
    }
    __syncwarp();
  }

  // Row i of four rows, given the place of the first one; and the place of the four rows after these. The swizzle XORs
  // the unit with the row.
  template <class T>
  static __device__ __forceinline__ T& of_four(Tile& x, uint32_t place, int i) {
    return *reinterpret_cast<T*>(x.bytes + (place ^ i * 16) + i * 128);
  }
  static __device__ __forceinline__ uint32_t next_four(uint32_t place) { return (place ^ 4 * 16) + 4 * 128; }

  // A diagonal block of X as rows of accumulators: rows `row` and `row + 8`, columns 2t and 2t + 1 of each eight.
  __device__ __forceinline__ void load_block(float (&y)[2][4], Tile& x, int I) const {
#pragma unroll
    for (int o = 0; o < 2; ++o)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 z = triangle<float2>(x, triangle_place(row, t / 2, t % 2 * 2), I, 8 * r, I, 2 * o);
        y[o][2 * r] = rounded_to_tf32(z.x), y[o][2 * r + 1] = rounded_to_tf32(z.y);
      }
  }

  // As a left operand of tf32: both operands sum over pairs of columns in the order of accumulators, 2t and 2t + 1
  // where the instruction has t and t + 4.
  static __device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[4]) {
    a[0] = tf32(c[0]), a[1] = tf32(c[2]), a[2] = tf32(c[1]), a[3] = tf32(c[3]);
  }

  // C = A B, 16 x 16, of which B is the block (I, 0) of what lies in x.
  __device__ __forceinline__ void multiply(float (&c)[2][4], const float (&a)[2][4], Tile& x, int I) const {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      uint32_t left[4];
      as_left(left, a[k]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t b[2];
#pragma unroll
        for (int odd = 0; odd < 2; ++odd)
          b[odd] = tf32(triangle<float>(x, triangle_place(2 * t, row / 4, row % 4), I, 8 * k + odd, 0, 2 * n));
        mma_tf32(c[n], left, b[0], b[1], k > 0);
      }
    }
  }

  // A block of X b as the sum of two numbers of bf16, as left operands. `b`: of the block's columns.
  struct Parts {
    uint32_t high[4], low[4];
  };
  __device__ __forceinline__ Parts split(const float (&y)[2][4], const float* b) const {
    Parts parts;
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const float2 factor = *reinterpret_cast<const float2*>(b + 8 * o + 2 * t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 z = {y[o][2 * r] * factor.x, y[o][2 * r + 1] * factor.y};
        const uint32_t rounded = pack_bf16(z.x, z.y);
        const float2 taken = unpack_bf16(rounded);
        parts.high[2 * o + r] = rounded;
        parts.low[2 * o + r] = pack_bf16(z.x - taken.x, z.y - taken.y);
      }
    }
    return parts;
  }

  __device__ __forceinline__ void store(Tile& x, const Parts& parts, int I, int J) const {
    const uint32_t place = swizzled(matrix_row(), matrix_unit());  // units are added by XOR
    unsigned char* const rows = x.bytes + I * kBlock * 128;
    store_matrices(rows + (place ^ 2 * J * 16), parts.high);
    store_matrices(rows + (place ^ (4 + 2 * J) * 16), parts.low);
  }

  // W = X b K~ in the place of K~, sixteen channels at a time.
  __device__ __forceinline__ void stage_W(Operands& x, const Parts& X11, const Parts& X21, const Parts& X22) const {
#pragma unroll 1
    for (int i = 0; i < kHeadDim / 16; ++i) {
      Tile& tile = x.of[i / 4].k;
      const uint32_t upper = swizzled(matrix_row(), 2 * (i % 4) + matrix_unit());
      unsigned char *const K1 = tile.bytes + upper, *const K2 = K1 + kBlock * 128;
      uint32_t k1[4], k2[4];
      load_matrices_transposed(k1, K1);
      load_matrices_transposed(k2, K2);
      float W[2][2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_bf16(W[0][n], X11.low, k1[2 * n], k1[2 * n + 1], false);
        mma_bf16(W[1][n], X21.low, k1[2 * n], k1[2 * n + 1], false);
        mma_bf16(W[1][n], X22.low, k2[2 * n], k2[2 * n + 1], true);
        mma_bf16(W[0][n], X11.high, k1[2 * n], k1[2 * n + 1], true);
        mma_bf16(W[1][n], X21.high, k1[2 * n], k1[2 * n + 1], true);
        mma_bf16(W[1][n], X22.high, k2[2 * n], k2[2 * n + 1], true);
      }
      __syncwarp();  // K~ is read
#pragma unroll
      for (int I = 0; I < 2; ++I) {
        uint32_t w[4];
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) w[2 * n + r] = pack_bf16(W[I][n][2 * r], W[I][n][2 * r + 1]);
        store_matrices(I == 0 ? K1 : K2, w);
      }
    }
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = team;; n += kTeams) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_L_ready[own.parity][own.stage], own.team_parity);
      recompute();
      if (seldom(s.own[own.stage].is_end())) return warp_arrive(&s.bar_prepared[own.stage]);
      mark(Stage::kInvert, c);
      Operands& x = s.operands[own.stage];
      diagonal_blocks(x.X, s.kn[own.stage]);
      float X11[2][4], X21[2][4], X22[2][4], product[2][4];
      load_block(X11, x.X, 0);
      load_block(X22, x.X, 1);
      multiply(product, X22, x.X, 1);
      multiply(X21, product, x.X, 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) X21[i / 4][i % 4] = rounded_to_tf32(-X21[i / 4][i % 4]);
      __syncwarp();  // X is in registers
      const float* const b = s.b[own.stage];
      const Parts left = split(X11, b), below = split(X21, b), right = split(X22, b + kBlock);
      store(x.X, left, 0, 0);
      store(x.X, below, 1, 0);
      store(x.X, right, 1, 1);
      store(x.X, Parts{}, 0, 1);
      mark(Stage::kW, c);
      stage_W(x, left, below, right);
      warp_arrive(&s.bar_prepared[own.stage]);
    }
  }
};

}  // namespace flash_kda
