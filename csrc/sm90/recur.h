// R: W, U, the output and the state, chunk after chunk. One warpgroup has 64 value columns.
//
// Everything is transposed, so that every left operand is already in registers: value columns are the rows of the
// accumulators, and an accumulator fragment has, k-step by k-step, the order of the next left operand.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

// A power of two for each of the two value columns of a thread, and its inverse.
struct Unit {
  float2 unit, inverse;

  // `size` / unit lies in [2^14, 2^15): what `size` bounds then fits fp16.
  static __device__ __forceinline__ void of(float size, float& unit, float& inverse) {
    const int exponent = min(max(int(__float_as_uint(size) >> 23), 16), 254);  // biased
    unit = __uint_as_float(uint32_t(exponent - 14) << 23);
    inverse = __uint_as_float(uint32_t(254 - (exponent - 14)) << 23);
  }

  __device__ __forceinline__ explicit Unit(float2 size) {
    of(size.x, unit.x, inverse.x);
    of(size.y, unit.y, inverse.y);
  }
};

struct Recur {
  const Params& p;
  SharedMemoryPlan& s;
  int thread, warp, lane, row, t;

  __device__ __forceinline__ Recur(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    thread = threadIdx.x;
    warp = thread / 32;
    lane = thread % 32;
    row = lane / 4;
    t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { cutlass::arch::NamedBarrier::sync(kWarpgroup, 2); }

  // S^T: S[4j + 0..1] are columns (value) 16 * warp + row, channels 8j + 2t + 0..1; S[4j + 2..3] value column + 8.
  __device__ __forceinline__ void load_state(const Chunk& item, float (&S)[64]) const {
    if (p.initial_state == nullptr) {
#pragma unroll
      for (int i = 0; i < 64; ++i) S[i] = 0.f;
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = item.sequence * p.initial_stride_sequence + item.head * p.initial_stride_head +
                             (item.column + 16 * warp + row + 8 * r) * p.initial_stride_value + 2 * t;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 x =
            p.initial_is_fp32
                ? *reinterpret_cast<const float2*>(static_cast<const float*>(p.initial_state) + offset + 8 * j)
                : unpack_bf16(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(p.initial_state) +
                                                                 offset + 8 * j));
        S[4 * j + 2 * r] = x.x;
        S[4 * j + 2 * r + 1] = x.y;
      }
    }
  }

  __device__ __forceinline__ void store_state(const Chunk& item, const float (&S)[64]) const {
    if (p.final_state == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = item.sequence * p.final_stride_sequence + item.head * p.final_stride_head +
                             (item.column + 16 * warp + row + 8 * r) * p.final_stride_value + 2 * t;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float x = S[4 * j + 2 * r], y = S[4 * j + 2 * r + 1];
        if (p.final_is_fp32)
          *reinterpret_cast<float2*>(static_cast<float*>(p.final_state) + offset + 8 * j) = {x, y};
        else
          *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(p.final_state) + offset + 8 * j) = pack_bf16(x, y);
      }
    }
  }

  static __device__ __forceinline__ float2 over_quad(float2 x, bool largest) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) {
      const float2 y = {__shfl_xor_sync(~0u, x.x, lanes), __shfl_xor_sync(~0u, x.y, lanes)};
      x = largest ? float2{fmaxf(x.x, y.x), fmaxf(x.y, y.y)} : float2{x.x + y.x, x.y + y.y};
    }
    return x;
  }

  // 16-byte unit of the value tile that this lane names in ldmatrix and stmatrix: tokens 16 * i .. 16 * i + 15.
  __device__ __forceinline__ unsigned char* value_row(Tile& tile, int i) const {
    return tile.bytes + swizzled(16 * i + 8 * (lane / 16) + lane % 8, 2 * warp + (lane / 8) % 2);
  }

  // Units of rows 8j + 2t and 8j + 2t + 1. Read again at each use: registers are scarce.
  __device__ __forceinline__ float2 row_unit(const uint16_t* units, int j) const {
    int index = 8 * j + 2 * t;
    forget(index);
    return unpack_bf16(*reinterpret_cast<const uint32_t*>(units + index));
  }

  __device__ __forceinline__ void chunk(float (&S)[64], const Chunk& at, const Slot& slot, Tile& v, int parity) {
    const int valid = at.valid;
    float X1[32], O[32];

    // X1^T = S^T K~^T and O^T = S^T Q~^T, with S in fp16 times a power of two for each value column
    float2 size = {0.f, 0.f}, size_odd = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      size.x += fabsf(S[4 * j]);
      size_odd.x += fabsf(S[4 * j + 1]);
      size.y += fabsf(S[4 * j + 2]);
      size_odd.y += fabsf(S[4 * j + 3]);
    }
    const Unit s_unit(over_quad({size.x + size_odd.x, size.y + size_odd.y}, false));
    {
      uint32_t S16[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float f = i % 2 ? s_unit.inverse.y : s_unit.inverse.x;
        S16[i] = pack_fp16(S[2 * i] * f, S[2 * i + 1] * f);
      }
      gmma_fence(X1);
      gmma_fence(O);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 8; ++k)
        gmma<GmmaFp16N64>(X1, S16[4 * k], S16[4 * k + 1], S16[4 * k + 2], S16[4 * k + 3],
                          gmma_descriptor(slot.k[k / 4].bytes + 32 * (k % 4), 16, 1024), k > 0);
      cute::warpgroup_commit_batch();
#pragma unroll
      for (int k = 0; k < 8; ++k)
        gmma<GmmaFp16N64>(O, S16[4 * k], S16[4 * k + 1], S16[4 * k + 2], S16[4 * k + 3],
                          gmma_descriptor(slot.q[k / 4].bytes + 32 * (k % 4), 16, 1024), k > 0);
      cute::warpgroup_commit_batch();
    }
    uint32_t V[16];  // tokens 8j + 2t, 8j + 2t + 1 of the two value columns: V[2j], V[2j + 1]
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices_transposed(V + 4 * i, value_row(v, i));
    cute::warpgroup_wait<1>();
    gmma_fence(X1);

    // W^T = b (V^T - X1^T), in place, as tf32
    const float* b = s.b[parity];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 bj = *reinterpret_cast<const float2*>(b + 8 * j + 2 * t);
      const float2 v0 = unpack_bf16(V[2 * j]), v1 = unpack_bf16(V[2 * j + 1]);
      const float2 f = row_unit(s.K_unit[parity], j);
      float w[4] = {bj.x * fmaf(-s_unit.unit.x * f.x, X1[4 * j], v0.x),
                    bj.y * fmaf(-s_unit.unit.x * f.y, X1[4 * j + 1], v0.y),
                    bj.x * fmaf(-s_unit.unit.y * f.x, X1[4 * j + 2], v1.x),
                    bj.y * fmaf(-s_unit.unit.y * f.y, X1[4 * j + 3], v1.y)};
      if (valid < kChunk) {  // rows past the end may hold anything, NaN included
#pragma unroll
        for (int x = 0; x < 4; ++x)
          if (8 * j + 2 * t + x % 2 >= valid) w[x] = 0.f;
      }
#pragma unroll
      for (int x = 0; x < 4; ++x) X1[4 * j + x] = __uint_as_float(tf32(w[x]));
    }

    // U^T = W^T X^T
    float U[32];
    Barrier::wait(&s.bar_XM_ready, parity);
    gmma_fence(X1);
    gmma_fence(U);
    cute::warpgroup_arrive();
    multiply_tf32(U, X1, s.X, false);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    gmma_fence(U);
    gmma_fence(O);

    // O^T = O^T + U^T M^T with U in tf32; U again in fp16 times a power of two for the state
    uint32_t U16[16];
    float2 largest = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 f = row_unit(s.Kr_unit[parity], j);
      largest.x = fmaxf(largest.x, fmaxf(fabsf(U[4 * j] * f.x), fabsf(U[4 * j + 1] * f.y)));
      largest.y = fmaxf(largest.y, fmaxf(fabsf(U[4 * j + 2] * f.x), fabsf(U[4 * j + 3] * f.y)));
    }
    const Unit u_unit(over_quad(largest, true));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 f = row_unit(s.Kr_unit[parity], j);
      U16[2 * j] = pack_fp16(U[4 * j] * f.x * u_unit.inverse.x, U[4 * j + 1] * f.y * u_unit.inverse.x);
      U16[2 * j + 1] = pack_fp16(U[4 * j + 2] * f.x * u_unit.inverse.y, U[4 * j + 3] * f.y * u_unit.inverse.y);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 f = row_unit(s.Q_unit[parity], j);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        U[4 * j + x] = __uint_as_float(tf32(U[4 * j + x]));
        O[4 * j + x] *= (x < 2 ? s_unit.unit.x : s_unit.unit.y) * (x % 2 ? f.y : f.x);
      }
    }
    gmma_fence(U);
    gmma_fence(O);
    cute::warpgroup_arrive();
    multiply_tf32(O, U, s.M, true);
    cute::warpgroup_commit_batch();
    const float* decay = s.decay[parity];
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 d = *reinterpret_cast<const float2*>(decay + 8 * j + 2 * t);
      S[4 * j] *= d.x;
      S[4 * j + 1] *= d.y;
      S[4 * j + 2] *= d.x;
      S[4 * j + 3] *= d.y;
    }
    cute::warpgroup_wait<0>();
    gmma_fence(O);

    // S^T = S^T exp(G_C) + U^T Kr
    float update[64];
    gmma_fence(update);
    gmma_fence(U16);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      gmma<GmmaFp16N128>(update, U16[4 * k], U16[4 * k + 1], U16[4 * k + 2], U16[4 * k + 3],
                         gmma_descriptor(slot.g[0].bytes + 2048 * k, kTileBytes, 1024), k > 0);
    cute::warpgroup_commit_batch();
    store_output(O, at, v, valid, parity);
    cute::warpgroup_wait<0>();
    gmma_fence(update);
#pragma unroll
    for (int i = 0; i < 64; ++i) S[i] = fmaf(update[i], i % 4 < 2 ? u_unit.unit.x : u_unit.unit.y, S[i]);
  }

  // Left operand: accumulators as tf32, in the column order of `triangle_offset`.
  static __device__ __forceinline__ void multiply_tf32(float (&c)[32], const float (&a)[32], const Tile* tiles,
                                                       bool accumulate) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      gmma<GmmaTf32N64>(c, __float_as_uint(a[4 * k]), __float_as_uint(a[4 * k + 2]), __float_as_uint(a[4 * k + 1]),
                        __float_as_uint(a[4 * k + 3]), gmma_descriptor(tiles[k / 4].bytes + 32 * (k % 4), 16, 1024),
                        accumulate || k > 0);
  }

  // Through the value tile, which this chunk no longer needs: each warp writes where it alone has read.
  __device__ __forceinline__ void store_output(const float (&O)[32], const Chunk& at, Tile& tile, int valid,
                                               int parity) {
    uint32_t o[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 f = row_unit(s.q_unit[parity], j);
      f.x *= p.scale;
      f.y *= p.scale;
      o[2 * j] = pack_bf16(O[4 * j] * f.x, O[4 * j + 1] * f.y);
      o[2 * j + 1] = pack_bf16(O[4 * j + 2] * f.x, O[4 * j + 3] * f.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_matrices_transposed(value_row(tile, i), o + 4 * i);
    sync();
    uint16_t* out =
        p.out + at.batch * p.out_stride_batch + at.token * p.out_stride_token + at.head * p.out_stride_head + at.column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 16 * i + thread / 8, unit = thread % 8;
      const uint4 x = *reinterpret_cast<const uint4*>(tile.bytes + swizzled(token, unit));
      if (token < valid) *reinterpret_cast<uint4*>(out + token * p.out_stride_token + unit * 8) = x;
    }
  }

  __device__ __forceinline__ void run() {
    Ring<kSlots> ring;
    Ring<kValueSlots> ring_v;
    float S[64];
    for (;; warp_arrive(&s.bar_slot_free[ring.stage]), ring.next()) {
      TransactionBarrier::wait(&s.bar_qkg_loaded[ring.stage], ring.parity);
      forget(warp), forget(lane), forget(row), forget(t);
      const Chunk& at = s.chunks[ring.stage];
      if (at.valid == Chunk::kEnd) break;
      if (at.first) load_state(at, S);
      if (at.valid > 0) {
        TransactionBarrier::wait(&s.bar_v_loaded[ring_v.stage], ring_v.parity);
        Barrier::wait(&s.bar_operands_ready[ring_v.stage], ring_v.parity);
        chunk(S, at, s.slots[ring.stage], s.v[ring_v.stage], ring_v.stage);
        warp_arrive(&s.bar_XM_free);
        ring_v.next();
      }
      if (at.last) store_state(at, S);
    }
  }
};

}  // namespace flash_kda
