// X = (I + L)^-1, in place over L, and the loads of later chunks.
//
// Four warps. 16 x 16 diagonal blocks by forward substitution in fp32; blocks below by X21 = -(X22 L21) X11, in pairs
// of 16 and then of 32, with tf32 operands.
#pragma once

#include "plan.h"
#include "prepare.h"
#include "ptx.h"

namespace flash_kda {

struct Invert {
  const Params& p;
  SharedMemoryPlan& s;
  int warp, lane, row, t;

  __device__ __forceinline__ Invert(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    warp = threadIdx.x / 32 - kInvertWarpgroup * (kWarpgroup / 32);
    lane = threadIdx.x % 32;
    row = lane / 4;
    t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { cutlass::arch::NamedBarrier::sync(kWarpgroup, 1); }

  // Lane j (and j + 16) has column j of the inverse.
  __device__ __forceinline__ void diagonal_block() {
    const int column = lane % 16, first = warp * kBlock;
    float x[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      float even = i == column ? 1.f : 0.f, odd = 0.f;
#pragma unroll
      for (int octet = 0; octet < 2; ++octet) {
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
          if (8 * octet + parity >= i) continue;
          const float4 l = *reinterpret_cast<const float4*>(&triangle(s.X, first + i, 2 * warp + octet, parity, 0));
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
      x[i] = even + odd;
    }
    __syncwarp();
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i)
        triangle(s.X, first + i, 2 * warp + column / 8, column % 2, (column % 8) / 2) = __uint_as_float(tf32(x[i]));
    }
  }

  // Fragments of 8 columns (left) or 8 rows (right) of what is stored, starting at 16 * block_row, 8 * octet.
  __device__ __forceinline__ void left(uint32_t (&a)[4], int block_row, int octet) const {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      a[x] = __float_as_uint(triangle(s.X, block_row * kBlock + row + 8 * (x % 2), octet, x / 2, t));
  }

  __device__ __forceinline__ void right(uint32_t (&b)[2], int row_octet, int octet) const {
#pragma unroll
    for (int x = 0; x < 2; ++x)
      b[x] = __float_as_uint(triangle(s.X, row_octet * 8 + 2 * t + x, octet, row % 2, row / 2));
  }

  static __device__ __forceinline__ void as_left(uint32_t (&a)[4], const float (&c)[4]) {
    a[0] = tf32(c[0]);
    a[1] = tf32(c[2]);
    a[2] = tf32(c[1]);
    a[3] = tf32(c[3]);
  }

  __device__ __forceinline__ void store(int block_row, int octet, const float (&c)[4]) {
#pragma unroll
    for (int x = 0; x < 4; ++x)
      triangle(s.X, block_row * kBlock + row + 8 * (x / 2), octet, x % 2, t) = __uint_as_float(tf32(-c[x]));
  }

  // Blocks (1, 0) and (3, 2); each warp 8 of the 16 columns of one.
  __device__ __forceinline__ void pairs_of_16() {
    const int upper = (warp % 2) * 2, lower = upper + 1, octet = 2 * upper + warp / 2;
    float product[2][4] = {}, result[4] = {};
    uint32_t a[4], b[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      left(a, lower, 2 * lower + k);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, 2 * lower + k, 2 * upper + n);
        mma_tf32(product[n], a, b[0], b[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      as_left(a, product[k]);
      right(b, 2 * upper + k, octet);
      mma_tf32(result, a, b[0], b[1]);
    }
    sync();
    store(lower, octet, result);
    sync();
  }

  // Blocks (2..3, 0..1); each warp one of them.
  __device__ __forceinline__ void pair_of_32() {
    const int block_row = 2 + warp % 2, block_column = warp / 2;
    float product[4][4] = {}, result[2][4] = {};
    uint32_t a[4], b[2];
#pragma unroll
    for (int k = 4; k < 8; ++k) {
      if (k >= 2 * block_row + 2) continue;
      left(a, block_row, k);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        right(b, k, n);
        mma_tf32(product[n], a, b[0], b[1]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k < 2 * block_column) continue;
      as_left(a, product[k]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        right(b, k, 2 * block_column + n);
        mma_tf32(result[n], a, b[0], b[1]);
      }
    }
    sync();
#pragma unroll
    for (int n = 0; n < 2; ++n) store(block_row, 2 * block_column + n, result[n]);
  }

  __device__ __forceinline__ void load(const CUtensorMap& map, uint64_t* barrier, Tile* tile, const Chunk& chunk,
                                       int channel) {
    cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), tile, channel,
                                 chunk.head, int(chunk.token), chunk.batch);
  }

  // q, k and g of the next chunk, and what it is.
  __device__ __forceinline__ void load_qkg(Ring<kSlots>& ring) {
    Barrier::wait(&s.bar_slot_free[ring.stage], ring.parity ^ 1);
    const Chunk chunk = s.walk.next(p);
    s.chunks[ring.stage] = chunk;
    uint64_t* barrier = &s.bar_qkg_loaded[ring.stage];
    if (chunk.valid > 0) {
      Slot& slot = s.slots[ring.stage];
      TransactionBarrier::arrive_and_expect_tx(barrier, sizeof(Slot));
      for (int half = 0; half < 2; ++half) {
        load(p.g, barrier, &slot.g[half], chunk, half * kHalf);
        load(p.q, barrier, &slot.q[half], chunk, half * kHalf);
        load(p.k, barrier, &slot.k[half], chunk, half * kHalf);
      }
    } else {
      Barrier::arrive(barrier);
    }
    ring.next();
  }

  __device__ __forceinline__ void load_v(const Chunk& chunk, Ring<kValueSlots>& ring) {
    if (chunk.valid <= 0) return;
    uint64_t* barrier = &s.bar_v_loaded[ring.stage];
    TransactionBarrier::arrive_and_expect_tx(barrier, sizeof(Tile));
    load(p.v, barrier, &s.v[ring.stage], chunk, chunk.column);
    ring.next();
  }

  __device__ __forceinline__ void run() {
    const bool loads = threadIdx.x % kWarpgroup == 0;
    Ring<kSlots> loading, ring;
    Ring<kValueSlots> loading_v;
    if (loads) {
      s.walk.start();
      load_qkg(loading);
      load_v(s.chunks[0], loading_v);
      load_qkg(loading);
    }
    int parity = 0;
    for (;; warp_arrive(&s.bar_slot_free[ring.stage]), ring.next()) {
      TransactionBarrier::wait(&s.bar_qkg_loaded[ring.stage], ring.parity);
      forget(warp), forget(lane), forget(row), forget(t);
      const int valid = s.chunks[ring.stage].valid;
      if (valid == Chunk::kEnd) break;
      if (valid > 0) Barrier::wait(&s.bar_L_ready, parity);
      // P has waited for the end of R on the chunk before this: the values of that one are done with, too.
      if (loads) {
        load_qkg(loading);
        load_v(s.chunks[ring.stage == kSlots - 1 ? 0 : ring.stage + 1], loading_v);
      }
      __syncwarp();
      if (valid == 0) continue;
      diagonal_block();
      sync();
      pairs_of_16();
      forget(row), forget(t);
      pair_of_32();
      warp_arrive(&s.bar_XM_ready);
      parity ^= 1;
    }
  }
};

}  // namespace flash_kda
