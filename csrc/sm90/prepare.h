// P: decays, norms, the decayed operands K~, Q~, Kr, and the triangles L and M of a chunk.
//
// Eight warps; warp (block, half) has the 16 tokens of one block and 64 of the 128 channels.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kNormEpsilon = 1e-6f;
constexpr int kMaxRise = 116;  // of the exponent of a tiny row: 1e3 * 2^116 stays in fp32
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
// first. Columns 8 * octet + 2 * t + odd.
__device__ __forceinline__ float& triangle(Tile* tiles, int row, int octet, int odd, int t) {
  const int origin =
      row * 128 + ((row & 7) << 4) + t * 4;  // of column 2t; the swizzle is an XOR of bits it leaves free
  return *reinterpret_cast<float*>(tiles[octet >> 2].bytes + (origin ^ (((octet & 3) * 2 + odd) << 4)));
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
  __device__ __forceinline__ void decays(Slot& slot, int valid, float rate, float2 bias) {
    const float bound = p.lower_bound * kLog2E;
    float2 product = {kLift, kLift}, sum = {0.f, 0.f};
    uint32_t kept[kBlock];  // bf16, rounded towards zero
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const int token = block * kBlock + i;
      const float2 g =
          unpack_bf16(*reinterpret_cast<const uint32_t*>(slot.g[half].bytes + swizzled(token, lane / 4) + t * 4));
      // sigmoid(x) = 1 / (1 + 2^z), z = -x log2(e). g + bias comes first: they may cancel. The bound keeps the product
      // of two denominators finite
      const float d0 = 1.f + exp2_approx(min_keep_nan(rate * (g.x + bias.x), 60.f));
      const float d1 = 1.f + exp2_approx(min_keep_nan(rate * (g.y + bias.y), 60.f));
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
      kept[i] = __byte_perm(__float_as_uint(product.x), __float_as_uint(product.y), 0x7632);
    }
    __syncwarp();  // g is read: its place is free
    largest_decays(slot, kept);
  }

  // The largest decay of each token over this half of the channels, from the start of the block (low half, times 2^58)
  // and to its end (high half), as bf16. Left in `Exchange`.
  __device__ __forceinline__ void largest_decays(Slot& slot, uint32_t (&kept)[kBlock]) {
    const uint32_t end =
        kept[kBlock - 1] + 0x3f803f80u;  // bf16 bits are close to logarithms: a quotient is a difference
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const uint32_t rest = end - kept[i];
      kept[i] = __vmaxu2(__byte_perm(kept[i], rest, 0x5410), __byte_perm(kept[i], rest, 0x7632));
    }
    // A butterfly over the lanes that halves the tokens each lane has: lane l ends with token l / 2.
#pragma unroll
    for (int half_lanes = 16, n = kBlock / 2; n >= 1; half_lanes /= 2, n /= 2) {
      const bool upper = lane & half_lanes;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const uint32_t mine = upper ? kept[i + n] : kept[i], other = upper ? kept[i] : kept[i + n];
        kept[i] = __vmaxu2(mine, __shfl_xor_sync(~0u, other, half_lanes));
      }
    }
    kept[0] = __vmaxu2(kept[0], __shfl_xor_sync(~0u, kept[0], 1));
    if (lane % 2 == 0) exchange(slot, half).largest[lane / 2] = kept[0];
  }

  // What the two warps of a block tell each other, in the place of g that the warp has read and will write as Kr.
  struct Exchange {
    uint32_t largest[kBlock];
    float norm[kBlock];     // of q (half 0) or k (half 1): what the row is multiplied by, times 2^-58
    uint16_t unit[kBlock];  // bf16, see `norms`
  };
  __device__ __forceinline__ Exchange& exchange(Slot& slot, int of) const {
    return *reinterpret_cast<Exchange*>(slot.g[of].bytes + block * kBlock * 128);
  }

  // 1 / |x| of the block's rows, x being q (half 0) or k (half 1). The squares are the diagonal of x x^T.
  //
  // x^ = rows * unit: `unit` is 1 unless |x^| is below 2^-4; then it is the power of two that brings the row to about
  // unit length, so that rows whose norm is far below 1e-3 keep their precision as fp16 operands.
  __device__ __forceinline__ void norms(Slot& slot, int valid) {
    Tile* tiles = half == 0 ? slot.q : slot.k;
    float squares[2], inverse[2];
    int rise[2] = {0, 0};
    row_squares(tiles, squares);
#pragma unroll
    for (int r = 0; r < 2; ++r) inverse[r] = rsqrt_approx(squares[r] + kNormEpsilon);
    // 2^-28 is about 1e-6 * 2^-8
    const bool ordinary =
        squares[0] >= 0x1p-27f && squares[0] < 0x1p120f && squares[1] >= 0x1p-27f && squares[1] < 0x1p120f;
    if (__any_sync(~0u, !ordinary)) unusual_norms(tiles, squares, inverse, rise);
    if (t == row / 2) {
      Exchange& x = exchange(slot, half);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = row + 8 * r;
        x.norm[i] = block * kBlock + i < valid ? inverse[r] * kUnlift : 0.f;
        x.unit[i] = static_cast<uint16_t>((127 - rise[r]) << 7);
      }
    }
  }

  // Rows that are tiny, huge, zero, or past the end of the sequence.
  __device__ __forceinline__ void unusual_norms(Tile* x, float (&squares)[2], float (&inverse)[2], int (&rise)[2]) {
    int shift[2];
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = squares[r] < 0x1p-60f ? 72 : (squares[r] < 0x1p120f ? 0 : -72);
      factor[r] = __uint_as_float(uint32_t(127 + shift[r]) << 23);
    }
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {  // exact, but for what is negligible beside the rest of its row
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
    row_squares(x, squares);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int up = max(shift[r], 0);
      const float original = squares[r] * (up ? 0x1p-144f : 1.f);
      inverse[r] = rsqrt_approx(shift[r] < 0 ? squares[r] : original + kNormEpsilon);
      const float length = squares[r] * inverse[r] * inverse[r];  // |x^|^2 * 2^(2 up)
      const int exponent = int((__float_as_uint(length) >> 23) & 255) - 127;
      if (squares[r] > 0.f && exponent < -8 + 2 * up) rise[r] = min(max(up - (exponent >> 1), 0), kMaxRise);
      inverse[r] *= __uint_as_float(uint32_t(127 + rise[r] - up) << 23);
    }
  }

  __device__ __forceinline__ void row_squares(const Tile* x, float (&squares)[2]) const {
    float c0[4] = {}, c1[4] = {};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t a[4];
      load_matrices(a, x[k / 4].bytes + swizzled(block * kBlock + lane % 16, (k % 4) * 2 + lane / 16));
      mma_bf16(c0, a, a[0], a[2]);
      mma_bf16(c1, a, a[1], a[3]);
    }
    // The diagonal lies in the lanes of t = row / 2; all lanes of a row get it.
    const int source = row * 4 + row / 2;
    squares[0] = __shfl_sync(~0u, row & 1 ? c0[1] : c0[0], source);
    squares[1] = __shfl_sync(~0u, row & 1 ? c1[3] : c1[2], source);
  }

  // Products of block decays for a channel pair, without the power of two of the largest channel. Each lane works out
  // its own pair, 2 * lane and 2 * lane + 1 of this half; MMA fragments fetch theirs by shuffle.
  struct Factors {
    float2 before;        // from the start of the chunk to the start of the block
    float2 after;         // from the end of the block to the end of the chunk
    float2 chunk;         // over the whole chunk, nothing left out
    uint32_t between[2];  // fp16: from the end of block (block - 2 - i) to the start of the block
    int before_exponent, after_exponent, between_exponent[2];  // biased, of what was left out
  };

  // The biased exponent of the largest of all channels, at least that of 2^-116; `x` loses it.
  static __device__ __forceinline__ int without_unit(float2& x, float2 other_half) {
    const float largest = fmaxf(fmaxf(x.x, x.y), fmaxf(other_half.x, other_half.y));
    const int exponent = max(int(__reduce_max_sync(~0u, __float_as_uint(largest)) >> 23), 127 - kMaxRise - 1);
    const float inverse = __uint_as_float(uint32_t(254 - exponent) << 23);
    x = {x.x * inverse, x.y * inverse};
    return exponent;
  }

  __device__ __forceinline__ Factors factors() const {
    Factors f;
    float2 before[2], after[2], between[2], whole[2][kBlocks];  // [this half, the other]
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      before[h] = after[h] = between[h] = {1.f, 1.f};
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        float2& w = whole[h][j];
        w = *reinterpret_cast<const float2*>(s.scratch[2 * j + (half ^ h)] + decay_offset(kBlock - 1, lane / 4, t));
        w = {w.x * kUnlift, w.y * kUnlift};
        if (j < block) before[h] = {before[h].x * w.x, before[h].y * w.y};
        if (j > block) after[h] = {after[h].x * w.x, after[h].y * w.y};
      }
    }
    const float2(&w)[kBlocks] = whole[0];
    f.chunk = {w[0].x * w[1].x * w[2].x * w[3].x, w[0].y * w[1].y * w[2].y * w[3].y};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 d = block == 3 ? whole[h][2 - i] : whole[h][1 - i];
        between[h] = {between[h].x * d.x, between[h].y * d.y};
      }
      float2 x = between[0];
      f.between_exponent[i] = without_unit(x, between[1]);
      f.between[i] = pack_fp16(x.x, x.y);
    }
    f.before = before[0];
    f.before_exponent = without_unit(f.before, before[1]);
    f.after = after[0];
    f.after_exponent = without_unit(f.after, after[1]);
    return f;
  }

  __device__ __forceinline__ float2 shuffle(float2 x, int octet) const {
    return {__shfl_sync(~0u, x.x, octet * 4 + t), __shfl_sync(~0u, x.y, octet * 4 + t)};
  }

  // What rows leave out, as biased exponents.
  struct Units {
    int row[2];     // of rows `row` and `row + 8`: the decay from the start of the block that all channels share
    int column[2];  // likewise to the end of the block
    int k[2];       // of the row of k itself, see `norms`
  };

  static __device__ __forceinline__ uint16_t as_bf16(int biased_exponent) {
    return static_cast<uint16_t>(max(biased_exponent, 0) << 7);
  }
  static __device__ __forceinline__ float power(int biased_exponent) {
    return __uint_as_float(uint32_t(max(biased_exponent, 0)) << 23);
  }

  // K~, Q~, Kr in place, the operands of L and M, and the diagonal blocks of L and M (this half of the channels),
  // times 2^-58 and without units.
  __device__ __forceinline__ Units operands(Slot& slot, int valid, int parity, const Factors& f,
                                            uint32_t (&k_row)[4][4], uint32_t (&q_row)[4][4], float (&L)[2][4],
                                            float (&M)[2][4]) {
    float q_norm[2], k_norm[2], row_inverse[2], column_inverse[2];
    bool present[2];
    Units units;
    Exchange &mine = exchange(slot, 0), &theirs = exchange(slot, 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row + 8 * r, token = block * kBlock + i;
      q_norm[r] = mine.norm[i];  // times 2^-58, which undoes the lift of the decays
      k_norm[r] = theirs.norm[i];
      present[r] = token < valid;
      const uint32_t largest = __vmaxu2(mine.largest[i], theirs.largest[i]);
      units.row[r] = (largest >> 7 & 255) - 58;
      units.column[r] = largest >> 23;
      units.k[r] = theirs.unit[i] >> 7;
      row_inverse[r] = power(254 - units.row[r]);
      column_inverse[r] = power(min(254 - units.column[r], 254));
      if (t == 0) {
        const int from_state = units.row[r] + f.before_exponent - 127;
        if (half == 0) {
          s.q_unit[parity][token] = mine.unit[i];
          s.Q_unit[parity][token] = as_bf16(from_state);
          s.K_unit[parity][token] = as_bf16(from_state + units.k[r] - 127);
        } else {
          const int column = units.column[r] + units.k[r] - 127;
          s.column_unit[parity][token] = as_bf16(column);
          s.Kr_unit[parity][token] = as_bf16(column + f.after_exponent - 127);
        }
      }
    }
    cutlass::arch::NamedBarrier::sync(64, 3 + block);  // both warps of the block have read what Kr now overwrites
    // Two 8 x 8 matrices at a time: lanes 0..15 name their rows.
    const int place = (block * kBlock + lane % 16) * 128;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 channels
      uint32_t k_column[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {  // 8 channels: one k-step of the tf32 products
        const int octet = 2 * i + m;
        const int offset = place + ((octet ^ (lane & 7)) << 4);
        const float2 before = shuffle(f.before, octet), after = shuffle(f.after, octet);
        const float2 whole = block_decay(block, octet);
        uint32_t k[2], q[2], k_tilde[2], q_tilde[2], k_rest[2], a_k[4], a_q[4], b[4];
        load_matrices(k, slot.k[half].bytes + offset);
        load_matrices(q, slot.q[half].bytes + offset);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float2 decay = *reinterpret_cast<const float2*>(scratch + decay_offset(row + 8 * r, octet, t));
          // Rows past the end may hold anything, NaN included.
          const float2 kv = unpack_bf16(present[r] ? k[r] : 0u), qv = unpack_bf16(present[r] ? q[r] : 0u);
          const float k0 = kv.x * k_norm[r], k1 = kv.y * k_norm[r];
          const float q0 = qv.x * q_norm[r], q1 = qv.y * q_norm[r];
          const float inverse = reciprocal_approx(decay.x * decay.y);
          const float2 shared = {decay.x * row_inverse[r], decay.y * row_inverse[r]};  // without the unit
          const float kr0 = k0 * shared.x, kr1 = k1 * shared.y;                        // rows
          const float qr0 = q0 * shared.x, qr1 = q1 * shared.y;
          // Columns, times 2^-58. The lift goes to the decay: only there no intermediate result overflows.
          const float kc0 = k0 * (inverse * (decay.y * kLift)), kc1 = k1 * (inverse * (decay.x * kLift));
          // Columns anchored at the end of the block, without the unit
          const float ke0 = kc0 * whole.x * column_inverse[r], ke1 = kc1 * whole.y * column_inverse[r];
          k_tilde[r] = pack_fp16(kr0 * before.x, kr1 * before.y);
          q_tilde[r] = pack_fp16(qr0 * before.x, qr1 * before.y);
          k_rest[r] = pack_fp16(ke0 * after.x, ke1 * after.y);
          k_column[2 * m + r] = pack_fp16(ke0, ke1);
          k_row[i][2 * m + r] = pack_fp16(kr0, kr1);
          q_row[i][2 * m + r] = pack_fp16(qr0, qr1);
          a_k[r] = tf32(kr0);
          a_k[r + 2] = tf32(kr1);
          a_q[r] = tf32(qr0);
          a_q[r + 2] = tf32(qr1);
          b[2 * r] = tf32(kc0);
          b[2 * r + 1] = tf32(kc1);
        }
        store_matrices(slot.k[half].bytes + offset, k_tilde);
        store_matrices(slot.q[half].bytes + offset, q_tilde);
        store_matrices(slot.g[half].bytes + offset, k_rest);
        mma_tf32(L[0], a_k, b[0], b[1]);
        mma_tf32(M[0], a_q, b[0], b[1]);
        mma_tf32(L[1], a_k, b[2], b[3]);
        mma_tf32(M[1], a_q, b[2], b[3]);
      }
      __syncwarp();  // the column operand overlays decays that other lanes have just read
      store_matrices(scratch + column_offset(lane % 16, i, lane / 16), k_column);
    }
    return units;
  }

  // The block of L and M in rows `block` and columns `block - back` (this half of the channels).
  __device__ __forceinline__ void off_diagonal(int back, const Factors& f, const uint32_t (&k_row)[4][4],
                                               const uint32_t (&q_row)[4][4], float (&L)[2][4], float (&M)[2][4]) {
    const unsigned char* columns =
        s.scratch[2 * (block - back) + half] + column_offset(lane % 8 + 8 * (lane / 16), 0, (lane / 8) % 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t column[4], a_k[4], a_q[4];
      load_matrices(column, columns + 1024 * i);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const uint32_t factor = back > 1 ? __shfl_sync(~0u, f.between[back - 2], (2 * i + m) * 4 + t) : 0u;
#pragma unroll
        for (int x = 2 * m; x < 2 * m + 2; ++x) {
          a_k[x] = back > 1 ? multiply_fp16x2(k_row[i][x], factor) : k_row[i][x];
          a_q[x] = back > 1 ? multiply_fp16x2(q_row[i][x], factor) : q_row[i][x];
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

  __device__ __forceinline__ void finish(int back, int parity, const Factors& f, const Units& units,
                                         const float (&mine)[2][4]) {
    Tile* tiles = half == 0 ? s.X : s.M;
    const int j = block - back;
    float factor[2];  // of the row; q's own unit waits for the output
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int lift = back == 0 ? 58 : (back == 1 ? 0 : f.between_exponent[back - 2] - 127);
      factor[r] = power(units.row[r] + lift);
      if (half == 0) factor[r] *= s.b[parity][block * kBlock + row + 8 * r] * power(units.k[r]);
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float2 unit;      // of the column
      if (back == 0) {  // inside the block the rows' own lanes know it
        unit = {power(__shfl_sync(~0u, units.k[n], 8 * t)), power(__shfl_sync(~0u, units.k[n], 8 * t + 4))};
      } else {
        unit = unpack_bf16(*reinterpret_cast<const uint32_t*>(s.column_unit[parity] + j * kBlock + 8 * n + 2 * t));
      }
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int i = row + 8 * (x / 2), column = 8 * n + 2 * t + x % 2;
        float& place = triangle(tiles, block * kBlock + i, 2 * j + n, x % 2, t);
        float value = (mine[n][x] + place) * factor[x / 2] * (x % 2 ? unit.y : unit.x);
        if (back == 0 && column >= i + half) value = 0.f;  // L: strictly below the diagonal; M: with it
        // Diagonal blocks of L stay fp32: they are inverted by substitution.
        place = half == 0 && back == 0 ? value : __uint_as_float(tf32(value));
      }
    }
  }

  __device__ __forceinline__ void keep(float (&mine)[2][4], const float (&L)[2][4], const float (&M)[2][4]) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int x = 0; x < 4; ++x) mine[n][x] = half == 0 ? L[n][x] : M[n][x];
  }

  __device__ __forceinline__ void run() {
    const int thread = threadIdx.x - kWarpgroup;
    Ring<kSlots> ring;
    int parity = 0;
    for (;; warp_arrive(&s.bar_slot_free[ring.stage]), ring.next()) {
      TransactionBarrier::wait(&s.bar_qkg_loaded[ring.stage], ring.parity);
      forget(block), forget(half), forget(lane), forget(row), forget(t);
      const Chunk& chunk = s.chunks[ring.stage];
      const int valid = chunk.valid;
      if (valid == Chunk::kEnd) break;
      if (valid == 0) continue;
      Slot& slot = s.slots[ring.stage];
      const int head = chunk.head;
      // Kept finite and above zero: g + bias may be 0 or infinite, and neither may become NaN.
      const float rate = -kLog2E * fminf(fmaxf(expf(__ldg(p.A_log + head)), 0x1p-126f), 0x1p126f);
      const float* d = p.dt_bias + head * p.dt_bias_stride + half * kHalf + 2 * lane;
      const float2 bias = {__ldg(d), __ldg(d + 1)};
      float logit = 0.f;
      if (thread < valid) {
        const int64_t offset = chunk.batch * p.beta_stride_batch + (chunk.token + thread) * p.beta_stride_token +
                               head * p.beta_stride_head;
        logit = __uint_as_float(static_cast<uint32_t>(p.beta[offset]) << 16);
      }
      decays(slot, valid, rate, bias);
      norms(slot, valid);
      if (thread < kChunk)
        s.b[parity][thread] = thread < valid ? reciprocal_approx(1.f + exp2_approx(-kLog2E * logit)) : 0.f;
      sync();

      uint32_t k_row[4][4], q_row[4][4];
      float L[2][4] = {}, M[2][4] = {};
      const Factors f = factors();
      if (block == 0) *reinterpret_cast<float2*>(&s.decay[parity][half * kHalf + 2 * lane]) = f.chunk;
      const Units units = operands(slot, valid, parity, f, k_row, q_row, L, M);
      warp_arrive(&s.bar_operands_ready[parity]);

      float mine[kBlocks][2][4];
      Barrier::wait(&s.bar_XM_free, parity ^ 1);
      hand_over(block, L, M);
      keep(mine[0], L, M);
      sync();
      forget(lane), forget(row), forget(t);
#pragma unroll
      for (int back = 1; back < kBlocks; ++back) {
        if (back > block) continue;
        float l[2][4] = {}, m[2][4] = {};
        off_diagonal(back, f, k_row, q_row, l, m);
        hand_over(block - back, l, m);
        keep(mine[back], l, m);
      }
      sync();
      forget(lane), forget(row), forget(t);
#pragma unroll
      for (int back = 0; back < kBlocks; ++back)
        if (back <= block) finish(back, parity, f, units, mine[back]);
      warp_arrive(half == 0 ? &s.bar_L_ready : &s.bar_XM_ready);
      parity ^= 1;
    }
  }
};

}  // namespace flash_kda
