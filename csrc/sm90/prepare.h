// P: decays, norms, the decayed operands K~, Q~, Kr, and the triangles L and M of a chunk.
//
// Eight warps; warp (block, half) has the 16 tokens of one block and 64 of the 128 channels.
#pragma once

#include "config.h"
#include "ptx.h"
#include "walk.h"

namespace flash_kda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;
// Decays from the start of a block are kept times 2^58: they reach down to 2^-115.4, so the product of two neighbours
// stays inside the range of fp32 and one reciprocal serves both.
constexpr float kLift = 0x1p58f;
constexpr float kUnlift = 0x1p-58f;

// Where the decay of (token of the block, channel pair) lies in a warp's scratch region: for each 16 channels 1 KB of
// 16 rows of 64 bytes. `octet`: 8 channels, 0..7; `pair`: two channels of it, 0..3.
__device__ __forceinline__ int decay_offset(int row, int octet, int pair) {
  const int in_row = ((octet & 1) ^ ((row >> 1) & 1)) * 32 + pair * 8;
  return (octet >> 1) * 1024 + ((row * 64 + in_row) ^ (((octet >> 1) & 1) * 64));
}

// Where the column operand of L and M overlays it: fp16, rows of 32 bytes in the first half of each 1 KB.
__device__ __forceinline__ int column_offset(int row, int sixteen, int unit) {
  return sixteen * 1024 + row * 32 + ((unit ^ ((row >> 2) & 1)) << 4);
}

// L, X and M in shared memory are right operands of tf32 wgmma, whose A fragments are accumulators of the MMA before.
// These hold columns 2t and 2t + 1 where a tf32 fragment wants t and t + 4: so of each 8 columns the even ones come
// first. Byte offset of columns 8 * octet + 2 * t + odd.
__device__ __forceinline__ int triangle_offset(int row, int octet, int odd, int t) {
  return (octet >> 2) * kTileBytes + swizzled(row, (octet & 3) * 2 + odd) + t * 4;
}

__device__ __forceinline__ float& triangle(Tile* tiles, int row, int octet, int odd, int t) {
  return *reinterpret_cast<float*>(tiles[0].bytes + triangle_offset(row, octet, odd, t));
}

struct Prepare {
  const Params& p;
  SharedMemoryPlan& s;
  int lane, block, half;
  int row, t;  // of an MMA fragment: rows `row` and `row + 8`, columns 2t and 2t + 1
  unsigned char* scratch;

  __device__ __forceinline__ Prepare(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    const int warp = threadIdx.x / 32 - kWarpgroup / 32;
    lane = threadIdx.x % 32;
    block = warp / 2;
    half = warp % 2;
    row = lane / 4;
    t = lane % 4;
    scratch = s.scratch[warp];
  }

  static __device__ __forceinline__ void sync() { cutlass::arch::NamedBarrier::sync(kPrepareThreads, 0); }

  __device__ __forceinline__ float2 block_decay(int of, int octet) const {  // times kLift
    return *reinterpret_cast<const float2*>(s.scratch[2 * of + half] + decay_offset(kBlock - 1, octet, t));
  }

  // Decay of each token from the start of its block, by a running product; thread: two channels, 16 tokens.
  __device__ __forceinline__ void decays(const Slot& slot, int valid, float rate, float2 bias) {
    const float bound = p.lower_bound * kLog2E;
    float2 product = {kLift, kLift}, sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int token = block * kBlock + i;
      const float2 g =
          unpack_bf16(*reinterpret_cast<const uint32_t*>(slot.g[half].bytes + swizzled(token, lane / 4) + t * 4));
      // sigmoid(x) = 1 / (1 + 2^z), z = -x log2(e); the bound keeps the product of two denominators finite
      const float d0 = 1.f + exp2_approx(min_keep_nan(fmaf(g.x, rate, bias.x), 60.f));
      const float d1 = 1.f + exp2_approx(min_keep_nan(fmaf(g.y, rate, bias.y), 60.f));
      const float r = bound * reciprocal_approx(d0 * d1);
      float2 a = {r * d1, r * d0};
      if (token >= valid) a = {0.f, 0.f};
      sum.x += a.x;
      sum.y += a.y;
      if (i < kBlock - 1) {
        product.x *= exp2_approx(a.x);
        product.y *= exp2_approx(a.y);
      } else {
        // The last one stands for the whole block: from the sum, so that 16 roundings do not go into the state.
        product = {kLift * exp2_approx(sum.x), kLift * exp2_approx(sum.y)};
      }
      *reinterpret_cast<float2*>(scratch + decay_offset(i, lane / 4, t)) = product;
    }
  }

  // 1 / |q| (half 0) or 1 / |k| (half 1) of the block's rows: the diagonal of x x^T.
  __device__ __forceinline__ void norms(const Slot& slot, int valid) {
    const Tile* x = half == 0 ? slot.q : slot.k;
    float squares[2];
    row_squares(x, false, squares);
    const bool mine = t == row / 2;
    float inverse[2] = {rsqrt_approx(squares[0] + kNormEpsilon), rsqrt_approx(squares[1] + kNormEpsilon)};
    const bool large = mine && !(squares[0] < 0x1p120f && squares[1] < 0x1p120f);
    if (__any_sync(~0u, large)) {
      float shrunk[2];
      row_squares(x, true, shrunk);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (!(squares[i] < 0x1p120f)) inverse[i] = rsqrt_approx(shrunk[i]) * 0x1p-64f;
    }
    if (mine) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = block * kBlock + row + 8 * i;
        s.norm[half][token] = token < valid ? inverse[i] : 0.f;
      }
    }
  }

  __device__ __forceinline__ void row_squares(const Tile* x, bool shrink, float (&squares)[2]) const {
    float c0[4] = {}, c1[4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t a[4];
      load_matrices(a, x[k / 4].bytes + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16));
      if (shrink) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 y = unpack_bf16(a[i]);
          a[i] = pack_bf16(y.x * 0x1p-64f, y.y * 0x1p-64f);
        }
      }
      mma_bf16(c0, a, a[0], a[2]);
      mma_bf16(c1, a, a[1], a[3]);
    }
    squares[0] = row & 1 ? c0[1] : c0[0];
    squares[1] = row & 1 ? c1[3] : c1[2];
  }

  // K~, Q~, Kr in place, the operands of L and M, and the diagonal blocks of L and M (this half of the channels).
  __device__ __forceinline__ void operands(Slot& slot, int valid, uint32_t (&k_row)[4][4], uint32_t (&q_row)[4][4],
                                           float (&L)[2][4], float (&M)[2][4]) {
    float q_norm[2], k_norm[2];
    bool present[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = block * kBlock + row + 8 * r;
      q_norm[r] = s.norm[0][token];
      k_norm[r] = s.norm[1][token];
      present[r] = token < valid;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 channels
      const int offset = swizzled(block * kBlock + lane % 16, i * 2 + lane / 16);
      uint32_t k[4], q[4], k_tilde[4], q_tilde[4], k_rest[4], k_column[4];
      load_matrices(k, slot.k[half].bytes + offset);
      load_matrices(q, slot.q[half].bytes + offset);
#pragma unroll
      for (int m = 0; m < 2; ++m) {  // 8 channels: one k-step of the tf32 products
        const int octet = 2 * i + m;
        float2 before = {kUnlift, kUnlift}, after = {1.f, 1.f};
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          if (j == block) continue;
          const float2 d = block_decay(j, octet);
          float2& x = j < block ? before : after;
          x.x *= d.x * kUnlift;
          x.y *= d.y * kUnlift;
        }
        const float2 whole = block_decay(block, octet);
        uint32_t a_k[4], a_q[4], b[4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int x = 2 * m + r;
          const float2 decay = *reinterpret_cast<const float2*>(scratch + decay_offset(row + 8 * r, octet, t));
          // Rows past the end may hold anything, NaN included.
          const float2 kv = unpack_bf16(present[r] ? k[x] : 0u), qv = unpack_bf16(present[r] ? q[x] : 0u);
          const float k0 = kv.x * k_norm[r], k1 = kv.y * k_norm[r];
          const float q0 = qv.x * q_norm[r], q1 = qv.y * q_norm[r];
          const float inverse = reciprocal_approx(decay.x * decay.y);
          const float kr0 = k0 * decay.x, kr1 = k1 * decay.y;  // rows: times 2^58
          const float qr0 = q0 * decay.x, qr1 = q1 * decay.y;
          const float kc0 = k0 * (inverse * decay.y), kc1 = k1 * (inverse * decay.x);  // columns: times 2^-58
          const float ke0 = kc0 * whole.x, ke1 = kc1 * whole.y;  // columns anchored at the end of the block
          k_tilde[x] = pack_fp16(kr0 * before.x, kr1 * before.y);
          q_tilde[x] = pack_fp16(qr0 * before.x, qr1 * before.y);
          k_rest[x] = pack_fp16(ke0 * after.x, ke1 * after.y);
          k_column[x] = pack_fp16(ke0, ke1);
          k_row[i][x] = pack_fp16(kr0 * kUnlift, kr1 * kUnlift);
          q_row[i][x] = pack_fp16(qr0 * kUnlift, qr1 * kUnlift);
          a_k[r] = tf32(kr0);
          a_k[r + 2] = tf32(kr1);
          a_q[r] = tf32(qr0);
          a_q[r + 2] = tf32(qr1);
          b[2 * r] = tf32(kc0);
          b[2 * r + 1] = tf32(kc1);
        }
        mma_tf32(L[0], a_k, b[0], b[1]);
        mma_tf32(M[0], a_q, b[0], b[1]);
        mma_tf32(L[1], a_k, b[2], b[3]);
        mma_tf32(M[1], a_q, b[2], b[3]);
      }
      __syncwarp();  // the column operand overlays decays that other lanes have just read
      store_matrices(slot.k[half].bytes + offset, k_tilde);
      store_matrices(slot.q[half].bytes + offset, q_tilde);
      store_matrices(slot.g[half].bytes + offset, k_rest);
      store_matrices(scratch + column_offset(lane % 16, i, lane / 16), k_column);
    }
  }

  // The block of L and M in rows `block` and columns `j` < block (this half of the channels).
  __device__ __forceinline__ void off_diagonal(int j, const uint32_t (&k_row)[4][4], const uint32_t (&q_row)[4][4],
                                               float (&L)[2][4], float (&M)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t column[4], a_k[4], a_q[4];
      load_matrices(column, s.scratch[2 * j + half] + column_offset(lane % 8 + 8 * (lane / 16), i, (lane / 8) % 2));
#pragma unroll
      for (int x = 0; x < 4; ++x) a_k[x] = k_row[i][x], a_q[x] = q_row[i][x];
      if (j + 1 < block) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float2 between = {1.f, 1.f};
#pragma unroll
          for (int n = 1; n < kBlocks - 1; ++n) {
            if (n <= j || n >= block) continue;
            const float2 d = block_decay(n, 2 * i + m);
            between.x *= d.x * kUnlift;
            between.y *= d.y * kUnlift;
          }
          const uint32_t factor = pack_fp16(between.x, between.y);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            a_k[2 * m + r] = multiply_fp16x2(a_k[2 * m + r], factor);
            a_q[2 * m + r] = multiply_fp16x2(a_q[2 * m + r], factor);
          }
        }
      }
      mma_fp16(L[0], a_k, column[0], column[1]);
      mma_fp16(M[0], a_q, column[0], column[1]);
      mma_fp16(L[1], a_k, column[2], column[3]);
      mma_fp16(M[1], a_q, column[2], column[3]);
    }
  }

  // The two warps of a block hold sums over half of the channels each. Half 0 finishes L, half 1 finishes M: each
  // leaves its part of the other's triangle in shared memory.
  __device__ __forceinline__ void hand_over(int j, const float (&L)[2][4], const float (&M)[2][4]) {
    Tile* tiles = half == 0 ? s.M : s.X;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x)
        triangle(tiles, block * kBlock + row + 8 * (x / 2), 2 * j + n, x % 2, t) = half == 0 ? M[n][x] : L[n][x];
    }
  }

  __device__ __forceinline__ void finish(int j, int parity, const float (&mine)[2][4]) {
    Tile* tiles = half == 0 ? s.X : s.M;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int i = row + 8 * (x / 2), column = 8 * n + 2 * t + x % 2;
        float& place = triangle(tiles, block * kBlock + i, 2 * j + n, x % 2, t);
        float value = mine[n][x] + place;
        if (half == 0) {
          value *= s.b[parity][block * kBlock + i];
          if (j == block)
            place = column < i ? value : 0.f;  // fp32: inverted by substitution
          else
            place = __uint_as_float(tf32(value));
        } else {
          place = j == block && column > i ? 0.f : __uint_as_float(tf32(value));
        }
      }
    }
  }

  // exp(G_C), by the warps of block 0.
  __device__ __forceinline__ void chunk_decay(int parity) {
    float2 d = {1.f, 1.f};
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float2 x =
          *reinterpret_cast<const float2*>(s.scratch[2 * j + half] + decay_offset(kBlock - 1, lane / 4, t));
      d.x *= x.x * kUnlift;
      d.y *= x.y * kUnlift;
    }
    *reinterpret_cast<float2*>(&s.decay[parity][half * kHalf + 2 * lane]) = d;
  }

  __device__ __forceinline__ void run() {
    const int thread = threadIdx.x - kWarpgroup;
    Ring<kSlots> ring;
    int parity = 0;
    int head = -1;
    float rate = 0.f;
    float2 bias = {0.f, 0.f};
    for (ChunkWalk walk(p); walk.more(p); walk.next(p), ring.next(), parity ^= 1) {
      const int valid = walk.valid();
      Slot& slot = s.slots[ring.stage];
      if (walk.item.head != head) {
        head = walk.item.head;
        rate = -kLog2E * expf(p.A_log[head]);
        const float* d = p.dt_bias + head * p.dt_bias_stride + half * kHalf + 2 * lane;
        bias = {rate * d[0], rate * d[1]};
      }
      float logit = 0.f;
      if (thread < valid) {
        const int64_t offset = walk.item.batch * p.beta_stride_batch +
                               (walk.item.start + walk.token + thread) * p.beta_stride_token +
                               head * p.beta_stride_head;
        logit = __uint_as_float(static_cast<uint32_t>(p.beta[offset]) << 16);
      }
      TransactionBarrier::wait(&s.bar_qkg_loaded[ring.stage], ring.parity);
      decays(slot, valid, rate, bias);
      norms(slot, valid);
      if (thread < kChunk)
        s.b[parity][thread] = thread < valid ? reciprocal_approx(1.f + exp2_approx(-kLog2E * logit)) : 0.f;
      sync();

      uint32_t k_row[4][4], q_row[4][4];
      float L[2][4] = {}, M[2][4] = {};
      operands(slot, valid, k_row, q_row, L, M);
      if (block == 0) chunk_decay(parity);
      warp_arrive(&s.bar_operands_ready[ring.stage]);

      float mine[kBlocks][2][4];
      Barrier::wait(&s.bar_XM_free, parity ^ 1);
      hand_over(block, L, M);
      keep(mine[0], L, M);
      sync();
#pragma unroll
      for (int back = 1; back < kBlocks; ++back) {
        if (back > block) continue;
        float l[2][4] = {}, m[2][4] = {};
        off_diagonal(block - back, k_row, q_row, l, m);
        hand_over(block - back, l, m);
        keep(mine[back], l, m);
      }
      sync();
#pragma unroll
      for (int back = 0; back < kBlocks; ++back)
        if (back <= block) finish(block - back, parity, mine[back]);
      warp_arrive(half == 0 ? &s.bar_L_ready : &s.bar_XM_ready);
    }
  }

  __device__ __forceinline__ void keep(float (&mine)[2][4], const float (&L)[2][4], const float (&M)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) mine[n][x] = half == 0 ? L[n][x] : M[n][x];
  }
};

}  // namespace flash_kda
