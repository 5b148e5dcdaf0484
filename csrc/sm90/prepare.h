// P: decays, the decayed operands K~, Q~, Kr, the triangles L and M of a chunk; and, after X, W of the chunk before.
//
// Eight warps. But for W, warp (block, half) has the 16 tokens of one block and 64 of the 128 channels.
#pragma once

#include "fragment.h"
#include "plan.h"
#include "ptx.h"
#include "timeline.h"
#include "triangle.h"

namespace flash_kda {

// Fragments hold channels 2t, 2t + 1, 2t + 8, 2t + 9 of each 16 (the A fragment of m16n8k16). Tables by channel are
// kept in that order, four channels side by side. Where the pair of channels `lane` of 64 goes, in floats:
__device__ __forceinline__ int pair_place(int lane) { return (lane / 8) * 16 + (lane % 4) * 4 + (lane / 4 % 2) * 2; }

struct Prepare : Fragment {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  uint32_t warp, block, half;
  float rate;  // of the head's gate, base 2 and negative
  float2 bias;

  __device__ __forceinline__ Prepare(const Params& params, SharedMemoryPlan& plan, int of_cluster)
      : p(params), s(plan), rank(of_cluster) {
    split_warp(threadIdx.x / kWarp - kFirstPrepareWarp);
  }

  __device__ __forceinline__ void split_warp(uint32_t of_prepare) {
    warp = of_prepare;
    forget(warp);
    block = warp / 2;
    half = warp % 2;
  }

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierPrepare, kPrepareWarps * kWarp); }

  __device__ __forceinline__ void load_gate(int head) {
    const float* biases = p.dt_bias + head * p.dt_bias_stride + half * kHalf + 2 * lane;
    bias = {biases[0], biases[1]};
    // kept finite and above zero: the sum is 0 or -inf where the gate says so, and neither may become NaN
    rate = -fminf(fmaxf(expf(p.A_log[head]) * kLog2E, 0x1p-126f), 0x1.fffffep127f);
  }

  // G of a block, by token: of 0..7 it goes to scratch, of 8..15 into the place of g, each 16 channels into that of those
  // 16 channels. Four channels of a token lie side by side, in orders in which neither writing nor reading meets more
  // bank conflicts than there have to be. `four`: which ones of the 16.
  __device__ __forceinline__ unsigned char* G_early(uint32_t sixteen, uint32_t token, uint32_t four) const {
    return s.scratch.columns[half][block] + sixteen * 512 + (token ^ (sixteen & 1)) * 64 + four * 16;
  }
  __device__ __forceinline__ unsigned char* G_late(Slot& slot, uint32_t sixteen, uint32_t token, uint32_t four) const {
    // Two rows a token, one 4 further than the other; token: from 8 on
    const uint32_t row = (token & 4) * 2 + (token & 1) * 2 + (token >> 1 & 1) + (four >> 1) * 4;
    return slot.g[half].bytes + swizzled(block * kBlock + row, 2 * sixteen + (four & 1));
  }

  // The same `i` tokens on, for i < 4, as an addition and a XOR of constants.
  static __device__ __forceinline__ SharedAddress G_early_on(SharedAddress place, int i) { return place ^ i * 64; }
  static __device__ __forceinline__ SharedAddress G_late_on(SharedAddress place, int i) {
    const int row = (i & 1) * 2 + (i >> 1);
    return (place ^ row << 4) + row * 128;
  }

  // Cumulative log-decays (base 2) from the start of the block; thread: two channels, 16 tokens.
  __device__ __forceinline__ void decays(Slot& slot) {
    uint32_t g[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      g[i] = *reinterpret_cast<const uint32_t*>(slot.g[half].bytes + swizzled(block * kBlock + i, lane / 4) + t * 4);
    __syncwarp();
    const float bound = p.lower_bound * kLog2E;
    float2 sum = {0.f, 0.f};
    constexpr int kStep = 4;  // tokens: few, for the size of the code
    const uint32_t pair = lane / 4 % 2 * 8;
    SharedAddress early = cast_smem_ptr_to_uint(G_early(lane / 8, 0, t)) + pair;
    SharedAddress late = cast_smem_ptr_to_uint(G_late(slot, lane / 8, 0, t)) + pair;
#pragma unroll 1
    for (int first = 0; first < kBlock; first += kStep) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const float2 x = unpack_bf16(g[i]);
        // g + bias comes first: they may cancel
        sum.x = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (x.x + bias.x))), sum.x);
        sum.y = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (x.y + bias.y))), sum.y);
        store_shared(first < 8 ? G_early_on(early, i) : G_late_on(late, i), sum);
      }
      if (first < 8)
        early += kStep * 64;
      else
        late += kStep * 256;
#pragma unroll
      for (int i = 0; i + kStep < kBlock; ++i) g[i] = g[i + kStep];
    }
    *reinterpret_cast<float2*>(&s.block_decay[block][half * kHalf + pair_place(lane)]) = {exp2_approx(sum.x),
                                                                                          exp2_approx(sum.y)};
  }

  // Decays before and after the block, thread: channels 2 * lane, 2 * lane + 1. The whole chunk's go into the factors.
  struct Around {
    float2 before, after;
  };
  __device__ __forceinline__ Around around(Factors& f) const {
    float2 before = {1.f, 1.f}, after = {1.f, 1.f}, whole = {1.f, 1.f};
#pragma unroll
    for (int J = 0; J < kBlocks; ++J) {
      const float2 w = *reinterpret_cast<const float2*>(&s.block_decay[J][half * kHalf + pair_place(lane)]);
      if (J < block) before = {before.x * w.x, before.y * w.y};
      if (J > block) after = {after.x * w.x, after.y * w.y};
      whole = {whole.x * w.x, whole.y * w.y};
    }
    if (block == 0) *reinterpret_cast<float2*>(&f.decay[half * kHalf + 2 * lane]) = whole;
    return {before, after};
  }

  // A pair of channels a lane, as the table has it -> the four channels of this lane's fragment in the i-th 16.
  __device__ __forceinline__ void of_fragment(float (&to)[4], float2 x, int i) const {
    const int from = i * 8 + t;
    to[0] = __shfl_sync(~0u, x.x, from), to[1] = __shfl_sync(~0u, x.y, from);
    to[2] = __shfl_sync(~0u, x.x, from + 4), to[3] = __shfl_sync(~0u, x.y, from + 4);
  }

  // The blocks of a row of blocks of L or M: on the diagonal, the neighbour below it, and those of blocks 0 and 1 that
  // are further away.
  enum { kDiagonal, kNeighbour, kFar0, kFar1, kParts };
  using Sums = float[kParts][2][4];

  __device__ __forceinline__ bool has(int part) const {
    return part == kDiagonal || (part == kNeighbour && block > 0) || (part == kFar0 && block > 1) ||
           (part == kFar1 && block > 2);
  }
  __device__ __forceinline__ uint32_t column_block(int part) const {
    return part == kDiagonal ? block : part == kNeighbour ? block - 1 : part - kFar0;
  }
  // Where the sums of a block lie, of the warp of one half of the channels.
  __device__ __forceinline__ float4& partial(uint32_t of_half, int part, int octet) const {
    const uint32_t index = block * (block + 1) / 2 + column_block(part);
    return *reinterpret_cast<float4*>(s.scratch.partial[of_half][index] + octet * 512 + lane * 16);
  }

  // Four channels a lane of rows `row` and `row + 8`: registers of a left operand (row + 8 if odd), channels c and c + 1.
  using Channels = float2[4];

  static __device__ __forceinline__ void pack(uint32_t (&y)[4], const Channels& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = pack_bf16(x[i].x, x[i].y);
  }
  // Multiplied by a factor of each channel.
  static __device__ __forceinline__ void pack(uint32_t (&y)[4], const Channels& x, const float (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = pack_bf16(x[i].x * w[i / 2 * 2], x[i].y * w[i / 2 * 2 + 1]);
  }

  // Columns as a right operand wants them: the registers of eight columns side by side.
  __device__ __forceinline__ void store_columns(unsigned char* to, const uint32_t (&x)[4]) const {
    *reinterpret_cast<uint4*>(to + lane * 16) = {x[0], x[2], x[1], x[3]};
  }
  // A block of L and of M, 16 channels of the sum.
  static __device__ __forceinline__ void multiply(Sums& L, Sums& M, int part, const uint32_t (&k_row)[4],
                                                  const uint32_t (&q_row)[4], const uint4& column) {
    mma_bf16(L[part][0], k_row, column.x, column.y, true);
    mma_bf16(M[part][0], q_row, column.x, column.y, true);
    mma_bf16(L[part][1], k_row, column.z, column.w, true);
    mma_bf16(M[part][1], q_row, column.z, column.w, true);
  }
  __device__ __forceinline__ uint4 load_columns(const unsigned char* from) const {
    return *reinterpret_cast<const uint4*>(from + lane * 16);
  }

  // K~, Q~, Kr in place, and L and M of the block's rows, half of the channels of their sums. Sixteen channels at a
  // time. `kn`: 1 / |k| of the fragment's rows.
  __device__ __forceinline__ void operands(Slot& slot, const Around& decay, const float (&kn)[2], Sums& L, Sums& M) {
    const uint32_t fragment = swizzled(block * kBlock + matrix_row(), matrix_unit());
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      unsigned char* const scratch = s.scratch.columns[half][block] + i * 512;
      const uint32_t place = fragment ^ (i << 5);
      float G[2][4], before[4], after[4], whole[4];
      *reinterpret_cast<float4*>(G[0]) = *reinterpret_cast<const float4*>(G_early(i, row, t));
      *reinterpret_cast<float4*>(G[1]) = *reinterpret_cast<const float4*>(G_late(slot, i, row, t));
      of_fragment(before, decay.before, i);
      of_fragment(after, decay.after, i);
      load_decay(whole, block, i);
      uint32_t k[4], q[4];
      load_matrices(k, slot.k[half].bytes + place);
      load_matrices(q, slot.q[half].bytes + place);
      __syncwarp();  // all of G is read: its place is free
      Channels kd, qd, ki;
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int r = x % 2, c = x / 2 * 2;
        const float2 kx = unpack_bf16(k[x]), qx = unpack_bf16(q[x]);
        const float2 d = {exp2_approx(G[r][c]), exp2_approx(G[r][c + 1])};
        const float2 inverse = {exp2_approx(-G[r][c]), exp2_approx(-G[r][c + 1])};
        kd[x] = {kx.x * d.x, kx.y * d.y};
        qd[x] = {qx.x * d.x, qx.y * d.y};
        ki[x] = {kx.x * inverse.x, kx.y * inverse.y};
      }
      uint32_t k_row[4], q_row[4], y[4];
      pack(k_row, kd);
      pack(q_row, qd);
      pack(y, ki);
      multiply(L, M, kDiagonal, k_row, q_row, {y[0], y[2], y[1], y[3]});
      pack(y, qd, before);
      store_matrices(slot.q[half].bytes + place, y);
#pragma unroll
      for (int x = 0; x < 4; ++x)
        y[x] = pack_bf16(kd[x].x * before[x / 2 * 2] * kn[x % 2], kd[x].y * before[x / 2 * 2 + 1] * kn[x % 2]);
      store_matrices(slot.k[half].bytes + place, y);
#pragma unroll
      for (int x = 0; x < 4; ++x) ki[x] = {ki[x].x * whole[x / 2 * 2], ki[x].y * whole[x / 2 * 2 + 1]};
      pack(y, ki, after);
      store_matrices(slot.g[half].bytes + place, y);
      // Rows and columns that are anchored at a boundary of a block, anchored at its other one: the chunk's middle.
      uint32_t k_far[4], q_far[4];
      if (block == 3) {
        load_decay(whole, 2, i);
        pack(k_far, kd, whole);
        pack(q_far, qd, whole);
      } else {
#pragma unroll
        for (int x = 0; x < 4; ++x) k_far[x] = k_row[x], q_far[x] = q_row[x];
        pack(y, ki);
        store_columns(scratch, y);
        if (block == 0) {
          load_decay(whole, 1, i);
          pack(y, ki, whole);
          store_columns(s.scratch.first_columns[half] + i * 512, y);
        }
      }
      sync_threads(kBarrierHalf + half, kWarpgroup);  // these channels' columns of all blocks are there
      if (has(kNeighbour)) multiply(L, M, kNeighbour, k_row, q_row, load_columns(scratch - sizeof(s.scratch.columns[0][0])));
      if (has(kFar0)) multiply(L, M, kFar0, k_far, q_far, load_columns(s.scratch.first_columns[half] + i * 512));
      if (has(kFar1)) multiply(L, M, kFar1, k_far, q_far, load_columns(s.scratch.columns[half][1] + i * 512));
    }
  }

  // The decay over a whole block, of this lane's four channels of the i-th 16.
  __device__ __forceinline__ void load_decay(float (&w)[4], uint32_t of_block, int i) const {
    *reinterpret_cast<float4*>(w) =
        *reinterpret_cast<const float4*>(&s.block_decay[of_block][half * kHalf + i * 16 + t * 4]);
  }

  // The two warps of a block exchange what the other one finishes: half 0 L, half 1 M.
  __device__ __forceinline__ void give(const Sums& x) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part)
      if (has(part))
#pragma unroll
        for (int o = 0; o < 2; ++o) partial(half, part, o) = {x[part][o][0], x[part][o][1], x[part][o][2], x[part][o][3]};
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
  __device__ __forceinline__ void store_L(Sums& x, const float (&factor)[2]) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (!has(part)) continue;
#pragma unroll
      for (int o = 0; o < 2; ++o)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float2 l = {factor[r] * x[part][o][2 * r], factor[r] * x[part][o][2 * r + 1]};
          if (part != kDiagonal) l = {__uint_as_float(tf32(l.x)), __uint_as_float(tf32(l.y))};
          triangle<float2>(s.triangles[kOwn], triangle_place(row, t / 2, t % 2 * 2), block, 8 * r, column_block(part),
                           2 * o) = l;
        }
    }
  }

  __device__ __forceinline__ void store_M(Sums& x) const {
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
      store_matrices(s.triangles[kOwn].M.bytes +
                         swizzled(block * kBlock + matrix_row(), 2 * column_block(part) + matrix_unit()),
                     m);
    }
  }

  // W = X b K~ in the place of K~. A warpgroup has 64 channels, a warp of it 16 tokens.
  __device__ __forceinline__ void stage_W(Tile (&k)[2]) const {
    const uint32_t group = warp / kWarpgroupWarps;
    float W[32];
    const KMajor X_high(s.triangles[kOwn].X_high.bytes), X_low(s.triangles[kOwn].X_low.bytes);
    const MNMajor K(k[group].bytes);
    gmma_fence(W);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      gmma_shared<gmma_atoms::Shared>(W, X_high.at(i * kKMajorStep), K.at(i * kMNMajorStep), i > 0);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i)
      gmma_shared<gmma_atoms::Shared>(W, X_low.at(i * kKMajorStep), K.at(i * kMNMajorStep), true);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    gmma_fence(W);
    sync_threads(kBarrierWarpgroup + group, kWarpgroup);  // K~ is read
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const w = W + 8 * j;
      const uint32_t m[4] = {pack_bf16(w[0], w[1]), pack_bf16(w[2], w[3]), pack_bf16(w[4], w[5]), pack_bf16(w[6], w[7])};
      store_matrices(k[group].bytes + swizzled(warp % kWarpgroupWarps * 16 + matrix_row(), 2 * j + matrix_unit()), m);
    }
  }

  // W of the n-th own chunk, as soon as its X is there: with it the chunk is prepared.
  __device__ __forceinline__ void finish(uint32_t n) const {
    const Own own(n);
    mark(Stage::kWaitPrepared, kPair * n + rank);
    Barrier::wait(&s.bar_X_ready, n % 2);
    mark(Stage::kW, kPair * n + rank);
    stage_W(s.slots[own.stage].k);
    warp_arrive(&s.bar_prepared[own.stage]);
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      const uint32_t c = kPair * n + rank;
      Slot& slot = s.slots[own.stage];
      const Chunk& at = s.own[own.stage];
      bool end = false;
      // The inverse of the chunk before takes as long as the decays of this one: those come first, if it is there.
      const bool late = n > 0 && !Barrier::test(&s.bar_loaded[own.stage], own.parity);
#pragma unroll 1
      for (int turn = 0; turn < 2; ++turn) {
        if (turn != late) {
          if (n > 0) finish(n - 1);
          continue;
        }
        mark(Stage::kWaitChunk, c);
        Barrier::wait(&s.bar_loaded[own.stage], own.parity);
        recompute();
        split_warp(warp);
        end = at.valid == Chunk::kEnd;
        if (end) continue;
        mark(Stage::kDecays, c);
        load_gate(at.head);
        if (at.valid < kChunk) Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);  // rows past the end are cleared
        decays(slot);
      }
      if (end) break;
      sync_threads(kBarrierHalf + half, kWarpgroup);
      recompute();
      const Around decay = around(s.factors[own.stage]);
      mark(Stage::kWaitRows, c);
      Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);
      mark(Stage::kOperands, c);
      const float* const kn = s.kn[own.stage];
      Sums L = {}, M = {};
      operands(slot, decay, {kn[block * kBlock + row], kn[block * kBlock + row + 8]}, L, M);
      recompute();
      split_warp(warp);
      sync();  // columns are read
      mark(Stage::kSums, c);
      if (half == 0)
        give(M);
      else
        give(L);
      if (n > 0) {  // X and M of the chunk before are free: R has multiplied with them, and the peer has its copies
        const Own before(n - 1);
        mark(Stage::kWaitFree, c);
        Barrier::wait(&s.bar_used[before.stage], before.parity);
        Barrier::wait(&s.bar_copied[before.stage], before.parity);
      }
      sync();
      mark(Stage::kSums, c);
      if (half == 0) {
        take(L);
        const uint32_t i = block * kBlock + row;
        const float* const b = s.b[own.stage];
        store_L(L, {b[i] * kn[i], b[i + 8] * kn[i + 8]});
      } else {
        take(M);
        store_M(M);
      }
      warp_arrive(&s.bar_L_ready);
      sync();  // sums are read
    }
  }
};

}  // namespace flash_kda
