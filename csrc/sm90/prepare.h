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

  // Where G of the first 8 tokens lies in the place of g: two rows a token, this one and the one 4 further. In this
  // order neither writing nor reading it meets more bank conflicts than there have to be.
  static __device__ __forceinline__ int early_row(int token) {
    return (token & 4) * 2 + (token & 1) * 2 + (token >> 1 & 1);
  }

  // Cumulative log-decays (base 2) from the start of the block; thread: two channels, 16 tokens. The first 8 tokens
  // take the place of g.
  __device__ __forceinline__ void decays(Slot& slot) {
    unsigned char* tile = slot.g[half].bytes + block * kBlock * 128;
    uint32_t g[kBlock];
#pragma unroll
    for (int i = 0; i < kBlock; ++i)
      g[i] = *reinterpret_cast<const uint32_t*>(tile + (((lane / 4) * 16 + t * 4) ^ ((i & 7) << 4)) + i * 128);
    __syncwarp();
    const int sixteen = lane / 8, pair = lane / 4 % 2;
    const int early = (t >> 1) * 512 + (((2 * sixteen + (t & 1)) ^ ((t >> 1) * 4)) << 4) + pair * 8;
    unsigned char* late = s.scratch.columns[half][block] + sixteen * 512 + t * 16 + pair * 8;
    const float bound = p.lower_bound * kLog2E;
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float2 x = unpack_bf16(g[i]);
      // g + bias comes first: they may cancel
      sum.x = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (x.x + bias.x))), sum.x);
      sum.y = fmaf(bound, reciprocal_approx(1.f + exp2_approx(rate * (x.y + bias.y))), sum.y);
      unsigned char* place = i < 8 ? tile + ((early ^ ((early_row(i) & 3) << 4)) + early_row(i) * 128)
                                   : late + ((i - 8) ^ (sixteen & 1)) * 64;
      *reinterpret_cast<float2*>(place) = sum;
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

  // K~, Q~, Kr in place, the operands of L and M (rows in registers, columns in scratch), and the products of the block
  // with itself. `kn`: 1 / |k| of the fragment's rows.
  __device__ __forceinline__ void operands(Slot& slot, const Around& decay, const float (&kn)[2],
                                           uint32_t (&k_row)[4][4], uint32_t (&q_row)[4][4],
                                           uint32_t (&q_middle)[4][4], float (&L)[2][4], float (&M)[2][4]) {
    const int origin = block * kBlock * 128;
    const int fragment = origin + (lane % 16) * 128 + (((lane / 16) ^ (lane & 7)) << 4);
    const int G_row = early_row(row) + (t >> 1) * 4;
    const int early = origin + G_row * 128 + (((G_row & 7) ^ (t & 1)) << 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 channels
      unsigned char* scratch = s.scratch.columns[half][block];
      forget(half);
      const int channels = i * 16 + t * 4;
      float G[2][4], before[4], after[4], whole[4];
      *reinterpret_cast<float4*>(G[0]) = *reinterpret_cast<const float4*>(slot.g[half].bytes + (early ^ (i << 5)));
      *reinterpret_cast<float4*>(G[1]) =
          *reinterpret_cast<const float4*>(scratch + i * 512 + (row ^ (i & 1)) * 64 + t * 16);
      of_fragment(before, decay.before, i);
      of_fragment(after, decay.after, i);
      *reinterpret_cast<float4*>(whole) =
          *reinterpret_cast<const float4*>(&s.block_decay[block][half * kHalf + channels]);
      unsigned char *k_place = slot.k[half].bytes + (fragment ^ (i << 5)),
                    *q_place = slot.q[half].bytes + (fragment ^ (i << 5)),
                    *g_place = slot.g[half].bytes + (fragment ^ (i << 5));
      uint32_t k[4], q[4];
      load_matrices(k, k_place);
      load_matrices(q, q_place);
      __syncwarp();  // all of G is read: its place is free
      uint32_t K[4], Q[4], Kr[4], k_column[4], k_end[4];
      float2 kd[4], qd[4], ke[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {  // registers of the fragment: row (+ 8 if odd), channels c and c + 1
        const int r = x % 2, c = x / 2 * 2;
        const float2 kx = unpack_bf16(k[x]), qx = unpack_bf16(q[x]);
        const float2 d = {exp2_approx(G[r][c]), exp2_approx(G[r][c + 1])};
        const float2 inverse = {exp2_approx(-G[r][c]), exp2_approx(-G[r][c + 1])};
        kd[x] = {kx.x * d.x, kx.y * d.y};
        qd[x] = {qx.x * d.x, qx.y * d.y};
        const float2 ki = {kx.x * inverse.x, kx.y * inverse.y};
        ke[x] = {ki.x * whole[c], ki.y * whole[c + 1]};
        k_row[i][x] = pack_bf16(kd[x].x, kd[x].y);
        q_row[i][x] = pack_bf16(qd[x].x, qd[x].y);
        K[x] = pack_bf16(kd[x].x * before[c] * kn[r], kd[x].y * before[c + 1] * kn[r]);
        Q[x] = pack_bf16(qd[x].x * before[c], qd[x].y * before[c + 1]);
        k_column[x] = pack_bf16(ki.x, ki.y);
        k_end[x] = pack_bf16(ke[x].x, ke[x].y);
        Kr[x] = pack_bf16(ke[x].x * after[c], ke[x].y * after[c + 1]);
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_bf16(L[n], k_row[i], k_column[n], k_column[2 + n], i > 0);
        mma_bf16(M[n], q_row[i], k_column[n], k_column[2 + n], i > 0);
      }
      store_matrices(k_place, K);
      store_matrices(q_place, Q);
      store_matrices(g_place, Kr);
      // Fragments as they are: what is an A fragment of rows is the B fragments of columns
      if (block == 3) {
        uint32_t k_middle[4];
        cross(k_middle, kd, 2, channels);
        cross(q_middle[i], qd, 2, channels);
        store_fragment(scratch, i, k_middle);
      } else {
        store_columns(scratch, i, k_end);
        if (block == 0) {
          uint32_t k_middle[4];
          cross(k_middle, ke, 1, channels);
          store_columns(s.scratch.first_columns[half], i, k_middle);
        }
      }
    }
  }

  // Rows or columns x that are anchored at a boundary of block `over`, anchored at its other one: the chunk's middle.
  __device__ __forceinline__ void cross(uint32_t (&y)[4], const float2 (&x)[4], int over, int channels) const {
    const float4 w = *reinterpret_cast<const float4*>(&s.block_decay[over][half * kHalf + channels]);
#pragma unroll
    for (int i = 0; i < 4; ++i) y[i] = pack_bf16_here(x[i].x * (i < 2 ? w.x : w.z), x[i].y * (i < 2 ? w.y : w.w));
  }

  __device__ __forceinline__ void store_fragment(unsigned char* to, int i, const uint32_t (&x)[4]) const {
    *reinterpret_cast<uint4*>(to + i * 512 + lane * 16) = {x[0], x[1], x[2], x[3]};
  }
  // As the right operand wants them: the registers of eight columns side by side.
  __device__ __forceinline__ void store_columns(unsigned char* to, int i, const uint32_t (&x)[4]) const {
    *reinterpret_cast<uint4*>(to + i * 512 + lane * 16) = {x[0], x[2], x[1], x[3]};
  }
  __device__ __forceinline__ void load_fragment(uint32_t (&x)[4], const unsigned char* from, int i) const {
    const uint4 y = *reinterpret_cast<const uint4*>(from + i * 512 + lane * 16);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }

  // One block of L and of M, 64 channels of the sum.
  __device__ __forceinline__ void product(float (&L)[2][4], float (&M)[2][4], const unsigned char* columns,
                                          const uint32_t (&k_row)[4][4], const uint32_t (&q_row)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t column[4];
      load_fragment(column, columns, i);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        mma_bf16(L[n], k_row[i], column[2 * n], column[2 * n + 1], i > 0);
        mma_bf16(M[n], q_row[i], column[2 * n], column[2 * n + 1], i > 0);
      }
    }
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

  // All of L and M but the diagonal blocks, half of the channels.
  __device__ __forceinline__ void products(Sums& L, Sums& M, uint32_t (&k_row)[4][4], uint32_t (&q_row)[4][4],
                                           const uint32_t (&q_middle)[4][4]) const {
    const auto& columns = s.scratch.columns[half];
    if (has(kNeighbour)) product(L[kNeighbour], M[kNeighbour], columns[block - 1], k_row, q_row);
    if (has(kFar1)) {  // block 3: rows anchored at the middle of the chunk
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_fragment(k_row[i], columns[3], i);
#pragma unroll
        for (int x = 0; x < 4; ++x) q_row[i][x] = q_middle[i][x];
      }
      product(L[kFar1], M[kFar1], columns[1], k_row, q_row);
    }
    if (has(kFar0)) product(L[kFar0], M[kFar0], s.scratch.first_columns[half], k_row, q_row);
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
      uint32_t k_row[4][4], q_row[4][4], q_middle[4][4];
      Sums L = {}, M = {};
      operands(slot, decay, {kn[block * kBlock + row], kn[block * kBlock + row + 8]}, k_row, q_row, q_middle,
               L[kDiagonal], M[kDiagonal]);
      recompute();
      split_warp(warp);
      sync_threads(kBarrierHalf + half, kWarpgroup);  // columns of all blocks are there
      mark(Stage::kProducts, c);
      products(L, M, k_row, q_row, q_middle);
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
