// P: norms, beta, decays, the decayed operands K~, Q~, Kr and the triangles L and M of a chunk.
//
// A team has four warps. Warp (block, half) has the 16 tokens of one block and 64 of the 128 channels.
#pragma once

#include "norms.h"
#include "plan.h"
#include "ptx.h"
#include "timeline.h"
#include "triangle.h"

namespace flash_kda {

// Fragments hold channels 2t, 2t + 1, 2t + 8, 2t + 9 of each 16 (the A fragment of m16n8k16). Tables by channel are
// kept in that order, four channels side by side. Where the pair of channels `lane` of 64 goes, in floats:
__device__ __forceinline__ int pair_place(int lane) { return (lane / 8) * 16 + (lane % 4) * 4 + (lane / 4 % 2) * 2; }

struct Prepare : Norms {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  uint32_t warp, team, block, half;
  float rate;  // of the head's gate, base 2 and negative
  float2 bias;

  __device__ __forceinline__ Prepare(const Params& params, SharedMemoryPlan& plan, int of_cluster)
      : p(params), s(plan), rank(of_cluster) {
    warp = threadIdx.x / kWarp - kFirstPrepareWarp;
    split_warp();
  }

  __device__ __forceinline__ void split_warp() {
    forget(warp);
    team = warp / kTeamWarps;
    block = warp / 2 % kBlocks;
    half = warp % 2;
  }

  __device__ __forceinline__ void sync_team() const { sync_threads(kBarrierTeam + team, kTeamWarps * kWarp); }
  __device__ __forceinline__ void sync_half() const { sync_threads(kBarrierHalf + 2 * team + half, kBlocks * kWarp); }
  __device__ __forceinline__ void sync_block() const { sync_threads(kBarrierBlock + 2 * team + block, 2 * kWarp); }

  __device__ __forceinline__ unsigned char* scratch(uint32_t of_block) const {
    return s.scratch[team][half][of_block].bytes;
  }

  __device__ __forceinline__ void load_gate(int head) {
    const float* biases = p.dt_bias + head * p.dt_bias_stride + half * kHalf + 2 * lane;
    bias = {biases[0], biases[1]};
    // kept finite and above zero: the sum is 0 or -inf where the gate says so, and neither may become NaN
    rate = -fminf(fmaxf(expf(p.A_log[head]) * kLog2E, 0x1p-126f), 0x1.fffffep127f);
  }

  // Rows, before anything else ----------------------------------------------------------------------------------------

  // This warp's rows of q (tensor 0), k (1) or g (2).
  __device__ __forceinline__ unsigned char* rows_of(Operands& x, int tensor) const {
    return (&x.of[half].q)[tensor].bytes + block * kBlock * 128;
  }

  __device__ __forceinline__ void clear_past_end(Operands& x, int valid) const {
    const int from = valid - int(block * kBlock);
    clear_rows(rows_of(x, 0), from, 0);
    clear_rows(rows_of(x, 1), from, 0);
    clear_rows(rows_of(x, 2), from, 0xff80ff80u);  // no decay follows from a gate of -inf
  }

  __device__ __forceinline__ float& squares_of(uint32_t of_half, int tensor, int r) const {
    return s.squares[team][of_half][tensor][block * kBlock + row + 8 * r];
  }
  // The sums of this half of the channels, for both halves.
  __device__ __forceinline__ void give_squares(Operands& x, int tensor) const {
    float squares[2];
    row_squares(rows_of(x, tensor), squares);
    if (t == 0) squares_of(half, tensor, 0) = squares[0], squares_of(half, tensor, 1) = squares[1];
  }
  __device__ __forceinline__ void take_squares(int tensor, float (&squares)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) squares[r] = squares_of(0, tensor, r) + squares_of(1, tensor, r);
  }

  // 1 / |x| of rows `row` and `row + 8` of q or k, once the squares of both halves are there. Rows from `valid` on are
  // zero.
  __device__ __forceinline__ void inverse_norms(Operands& x, int tensor, int valid, float (&inverse)[2]) const {
    float squares[2];
    take_squares(tensor, squares);
    bool ordinary[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool past = int(block * kBlock + row) + 8 * r >= valid;
      ordinary[r] = past || (squares[r] >= 0x1p-16f && squares[r] <= 0x1p16f);
      inverse[r] = past ? 0.f : rsqrt_approx(squares[r] + kNormEpsilon);
    }
    // Both warps of the block see the same squares: both come here, or none.
    if (seldom(!__all_sync(~0u, ordinary[0] && ordinary[1])))
      unusual_norms(rows_of(x, tensor), squares, ordinary, [&](float (&again)[2]) {
        sync_block();  // the first ones are read
        give_squares(x, tensor);
        sync_block();
        take_squares(tensor, again);
      }, inverse);
  }

  // The logit of beta of token `lane` of the block, as bf16.
  __device__ __forceinline__ uint32_t load_beta(const Chunk& at) const {
    const int token = min(int(block * kBlock + lane % kBlock), int(at.valid()) - 1);
    return p.beta[at.batch(p) * p.beta_stride_batch + (at.token + int64_t(token)) * p.beta_stride_token +
                  at.head * p.beta_stride_head];
  }

  // Decays ------------------------------------------------------------------------------------------------------------

  // G of a block, by token: of 0..7 it goes to scratch, of 8..15 into the place of g, each 16 channels into that of
  // those 16 channels. Four channels of a token lie side by side, in orders in which neither writing nor reading meets
  // more bank conflicts than there have to be. `four`: which ones of the 16.
  __device__ __forceinline__ unsigned char* G_early(uint32_t sixteen, uint32_t token, uint32_t four) const {
    return scratch(block) + sixteen * 512 + (token ^ (sixteen & 1)) * 64 + four * 16;
  }
  __device__ __forceinline__ unsigned char* G_late(Operands& x, uint32_t sixteen, uint32_t token, uint32_t four) const {
    // Two rows a token, one 4 further than the other; token: from 8 on
    const uint32_t row = (token & 4) * 2 + (token & 1) * 2 + (token >> 1 & 1) + (four >> 1) * 4;
    return x.of[half].g.bytes + swizzled(block * kBlock + row, 2 * sixteen + (four & 1));
  }

  // The same `i` tokens on, for i < 4, as an addition and a XOR of constants.
  static __device__ __forceinline__ SharedAddress G_early_on(SharedAddress place, int i) { return place ^ i * 64; }
  static __device__ __forceinline__ SharedAddress G_late_on(SharedAddress place, int i) {
    const int row = (i & 1) * 2 + (i >> 1);
    return (place ^ row << 4) + row * 128;
  }

  // Cumulative log-decays (base 2) from the start of the block; thread: two channels, 16 tokens. Four tokens at a time:
  // what these write in the place of g has been read, by them or before.
  __device__ __forceinline__ void decays(Operands& x) const {
    const uint32_t pair = lane / 4 % 2 * 8;
    SharedAddress early = cast_smem_ptr_to_uint(G_early(lane / 8, 0, t)) + pair;
    SharedAddress late = cast_smem_ptr_to_uint(G_late(x, lane / 8, 0, t)) + pair;
    const unsigned char* tile = x.of[half].g.bytes + block * kBlock * 128;
    uint32_t from = swizzled(0, lane / 4) + t * 4;
    constexpr int kStep = 4;  // for the size of the code
    uint32_t g[kStep] = {};
    const auto load = [&] {
#pragma unroll
      for (int i = 0; i < kStep; ++i) g[i] = *reinterpret_cast<const uint32_t*>(tile + (from ^ i << 4) + i * 128);
      from ^= kStep << 4, tile += kStep * 128;
    };
    const float bound = p.lower_bound * kLog2E;
    float2 sum = {0.f, 0.f};
#pragma unroll 1
    for (int first = -kStep; first < kBlock; first += kStep) {
      float2 gate[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) gate[i] = unpack_bf16(g[i]);
      if (first < kBlock - kStep) load();  // the next ones
      if (first < 0) continue;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        // g + bias comes first: they may cancel
        sum.x = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (gate[i].x + bias.x))), sum.x);
        sum.y = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (gate[i].y + bias.y))), sum.y);
        store_shared(first < 8 ? G_early_on(early, i) : G_late_on(late, i), sum);
      }
      if (first < 8)
        early += kStep * 64;
      else
        late += kStep * 256;
    }
    *reinterpret_cast<float2*>(&s.block_decay[team][block][half * kHalf + pair_place(lane)]) = {exp2_approx(sum.x),
                                                                                                exp2_approx(sum.y)};
  }

  // L and M of the rows of a block: with its own columns, and with those of block 0 for rows of block 1.
  enum { kDiagonal, kNeighbour, kParts };
  using Sums = float[kParts][2][4];

  __device__ __forceinline__ bool has(int part) const { return part == kDiagonal || block == 1; }
  __device__ __forceinline__ uint32_t column_block(int part) const { return part == kDiagonal ? block : 0; }

  // Four channels a lane of rows `row` and `row + 8`: registers of a left operand (row + 8 if odd), channels c and c
  // + 1.
  using Channels = float2[4];

  static __device__ __forceinline__ void pack(uint32_t (&y)[4], const Channels& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = pack_bf16(x[i].x, x[i].y);
  }
  // By a factor of each channel.
  static __device__ __forceinline__ void scale(Channels& x, const float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = {x[i].x * w[i / 2 * 2], x[i].y * w[i / 2 * 2 + 1]};
  }

  // A block of L and of M, 16 channels of the sum. Columns: the registers of eight columns side by side.
  static __device__ __forceinline__ void multiply(Sums& L, Sums& M, int part, const uint32_t (&k_row)[4],
                                                  const uint32_t (&q_row)[4], const uint4& columns) {
    mma_bf16(L[part][0], k_row, columns.x, columns.y, true);
    mma_bf16(M[part][0], q_row, columns.x, columns.y, true);
    mma_bf16(L[part][1], k_row, columns.z, columns.w, true);
    mma_bf16(M[part][1], q_row, columns.z, columns.w, true);
  }

  // The decay over a whole block, of this lane's four channels of the i-th 16.
  __device__ __forceinline__ void load_decay(float (&w)[4], uint32_t of_block, int i) const {
    *reinterpret_cast<float4*>(w) =
        *reinterpret_cast<const float4*>(&s.block_decay[team][of_block][half * kHalf + i * 16 + t * 4]);
  }

  // K~, Q~, Kr in place, the chunk's decay, and L and M, half of the channels of their sums. Sixteen channels at a
  // time. `kn`: 1 / |k| of the fragment's rows.
  __device__ __forceinline__ void operands(Operands& x, float* chunk_decay, const float (&kn)[2], Sums& L,
                                           Sums& M) const {
    const uint32_t fragment = swizzled(block * kBlock + matrix_row(), matrix_unit());
    float G[2][4], own[4], other[4];
    uint32_t k[4], q[4];
    const auto load = [&](int i) {
      *reinterpret_cast<float4*>(G[0]) = *reinterpret_cast<const float4*>(G_early(i, row, t));
      *reinterpret_cast<float4*>(G[1]) = *reinterpret_cast<const float4*>(G_late(x, i, row, t));
      load_decay(own, block, i);
      load_decay(other, block ^ 1, i);
      load_matrices(k, x.of[half].k.bytes + (fragment ^ (i << 5)));
      load_matrices(q, x.of[half].q.bytes + (fragment ^ (i << 5)));
    };
    uint32_t k_row[4] = {}, q_row[4] = {};
    uint4 of_block_0 = {};  // columns
#pragma unroll 1
    for (int i = -1; i < 4; ++i) {  // at first only what is needed next is asked for
      const uint32_t place = fragment ^ (i << 5);
      uint4* const columns = reinterpret_cast<uint4*>(scratch(0) + i * 512 + lane * 16);
      if (i >= 0) {
        if (has(kNeighbour) && i > 0) multiply(L, M, kNeighbour, k_row, q_row, of_block_0);  // of the channels before
        __syncwarp();  // all of G is read: its place is free
        if (block == 0 && row == 0) {
          float* to = chunk_decay + half * kHalf + i * 16 + 2 * t;
          *reinterpret_cast<float2*>(to) = {own[0] * other[0], own[1] * other[1]};
          *reinterpret_cast<float2*>(to + 8) = {own[2] * other[2], own[3] * other[3]};
        }
        Channels kd, qd, ki;
#pragma unroll
        for (int y = 0; y < 4; ++y) {
          const int r = y % 2, c = y / 2 * 2;
          const float2 kx = unpack_bf16(k[y]), qx = unpack_bf16(q[y]);
          const float2 d = {exp2_approx(G[r][c]), exp2_approx(G[r][c + 1])};
          const float2 inverse = {exp2_approx(-G[r][c]), exp2_approx(-G[r][c + 1])};
          kd[y] = {kx.x * d.x, kx.y * d.y};
          qd[y] = {qx.x * d.x, qx.y * d.y};
          ki[y] = {kx.x * inverse.x, kx.y * inverse.y};
        }
        uint32_t y[4];
        pack(k_row, kd);
        pack(q_row, qd);
        pack(y, ki);
        multiply(L, M, kDiagonal, k_row, q_row, {y[0], y[2], y[1], y[3]});
        scale(ki, own);
        // Then from the start of the chunk, and to its end.
        if (block == 0) {
          pack(y, ki);
          *columns = {y[0], y[2], y[1], y[3]};
          scale(ki, other);
        } else {
          scale(kd, other);
          scale(qd, other);
        }
        pack(y, qd);
        store_matrices(x.of[half].q.bytes + place, y);
#pragma unroll
        for (int z = 0; z < 4; ++z) y[z] = pack_bf16(kd[z].x * kn[z % 2], kd[z].y * kn[z % 2]);
        store_matrices(x.of[half].k.bytes + place, y);
        pack(y, ki);
        store_matrices(x.of[half].g.bytes + place, y);
      }
      if (i < 3) load(i + 1);
      if (i < 0) continue;
      sync_half();  // these columns of block 0 are there
      of_block_0 = *columns;
    }
    if (has(kNeighbour)) multiply(L, M, kNeighbour, k_row, q_row, of_block_0);
  }

  // Where the sums of a block lie, of the warp of one half of the channels: where that warp alone has worked, and whose
  // columns, if it had some, are read.
  __device__ __forceinline__ float4& partial(uint32_t of_half, int part, int octet) const {
    return *reinterpret_cast<float4*>(s.scratch[team][of_half][block].bytes + part * 1024 + octet * 512 + lane * 16);
  }

  // The two warps of a block exchange what the other one finishes: half 0 L, half 1 M.
  __device__ __forceinline__ void give(const Sums& x) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (has(part))
#pragma unroll
        for (int o = 0; o < 2; ++o)
          partial(half, part, o) = {x[part][o][0], x[part][o][1], x[part][o][2], x[part][o][3]};
  }
  __device__ __forceinline__ void take(Sums& x) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (has(part))
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          const float4 y = partial(half ^ 1, part, o);
          x[part][o][0] += y.x, x[part][o][1] += y.y, x[part][o][2] += y.z, x[part][o][3] += y.w;
        }
  }

  // L, with the factors of its rows, in fp32; off the diagonal as tf32.
  __device__ __forceinline__ void store_L(Tile& to, Sums& x, const float (&factor)[2]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) continue;
#pragma unroll
      for (int o = 0; o < 2; ++o)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 l = {factor[r] * x[part][o][2 * r], factor[r] * x[part][o][2 * r + 1]};
          if (part != kDiagonal) l = {__uint_as_float(tf32(l.x)), __uint_as_float(tf32(l.y))};
          triangle<float2>(to, triangle_place(row, t / 2, t % 2 * 2), block, 8 * r, column_block(part), 2 * o) = l;
        }
    }
  }

  __device__ __forceinline__ void store_M(Tile& to, Sums& x) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) continue;
      uint32_t m[4];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        if (part == kDiagonal) {  // a selection: above the diagonal there may be anything
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (8 * o + 2 * t + e % 2 > row + 8 * (e / 2)) x[part][o][e] = 0.f;
        }
        m[2 * o] = pack_bf16(x[part][o][0], x[part][o][1]);
        m[2 * o + 1] = pack_bf16(x[part][o][2], x[part][o][3]);
      }
      store_matrices(to.bytes + swizzled(block * kBlock + matrix_row(), 2 * column_block(part) + matrix_unit()), m);
    }
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = team;; n += kTeams) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      Operands& x = s.operands[own.stage];
      mark(Stage::kWaitChunk, c);
      Barrier::wait(&s.bar_loaded[own.stage], own.parity);
      recompute();
      split_warp();
      const Chunk at = s.own[own.stage];
      if (seldom(at.is_end())) break;
      mark(Stage::kNorms, c);
      const uint32_t logit = half == 0 ? load_beta(at) : 0;  // asked for first
      load_gate(at.head);
      const int valid = at.valid();
      if (seldom(valid < kChunk)) clear_past_end(x, valid);
#pragma unroll 1
      for (int tensor = 0; tensor < 2; ++tensor) give_squares(x, tensor);
      mark(Stage::kDecays, c);
      decays(x);
      sync_team();  // decays of both blocks, squares of both halves
      recompute();
      split_warp();
      mark(Stage::kNorms, c);
      const uint32_t i = block * kBlock + row;
      float kn[2];
#pragma unroll 1
      for (uint32_t tensor = 0; tensor < 2; ++tensor) {  // q, then k
        inverse_norms(x, tensor, valid, kn);
        if (half == tensor && t == 0) {
          float* const to = tensor == 0 ? s.factors[own.stage].q : s.kn[own.stage];
          const float factor = tensor == 0 ? p.scale : 1.f;
          to[i] = factor * kn[0], to[i + 8] = factor * kn[1];
        }
      }
      if (half == 0) {
        const uint32_t token = block * kBlock + lane % kBlock;
        const float x = int(token) < valid ? unpack_bf16(logit).x : -INFINITY;
        s.b[own.stage][token] = reciprocal_approx(1.f + exp2_approx(-kLog2E * x));
      }
      mark(Stage::kOperands, c);
      Sums L = {}, M = {};
      operands(x, s.factors[own.stage].decay, kn, L, M);
      mark(Stage::kSums, c);
      if (half == 0)
        give(M);
      else
        give(L);
      sync_block();
      if (half == 0) {
        take(L);
        store_L(x.X, L, {s.b[own.stage][i] * kn[0], s.b[own.stage][i + 8] * kn[1]});
      } else {
        take(M);
        store_M(x.M, M);
      }
      warp_arrive(&s.bar_L_ready[own.stage]);
      sync_team();  // sums and columns are read
    }
  }
};

}  // namespace flash_kda
