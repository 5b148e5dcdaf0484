// P: decays, the decayed operands K~, Q~, Kr, and the triangles L and M of a chunk.
//
// Eight warps; warp (block, half) has the 16 tokens of one block and 64 of the 128 channels.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

// Fragments hold channels 2t, 2t + 1, 2t + 8, 2t + 9 of each 16 (the A fragment of m16n8k16). Tables by channel are
// kept in that order, four channels side by side. Where the pair of channels `lane` of 64 goes, in floats:
__device__ __forceinline__ int pair_place(int lane) { return (lane / 8) * 16 + (lane % 4) * 4 + (lane / 4 % 2) * 2; }

// L or X: element (row, column 16 J + 8 octet + 2 t + odd) is in the 16-byte unit 4 (J % 2) + 2 octet + odd of its row,
// as the right operand of a tf32 wgmma wants it whose A fragments are the accumulators of the MMA before: those hold
// columns 2t and 2t + 1 where a tf32 fragment wants t and t + 4, so of each 8 columns the even ones come first. The
// 128-byte swizzle XORs the unit with the row. Columns 32.. have their rows 32.. alone, after all rows of columns ..31.
//
// What the lane decides comes first, then what the block decides: one XOR, and an offset that is an immediate.
__device__ __forceinline__ constexpr uint32_t triangle_place(uint32_t row, uint32_t unit, uint32_t t) {
  return row * 128 + (((row & 7) ^ unit) << 4) + t * 4;
}

// From where columns ..31 would begin to where columns 32.. would, if those had all rows.
constexpr int kRightTile = kTileBytes - 32 * 128;

// Byte offset of the element `rows` rows and `unit` units on from `place` in block (0, 0), in block (I, J). Units are
// added by XOR, and so are rows mod 8 in the swizzle: what is added has no bit in common with what there is.
__device__ __forceinline__ constexpr uint32_t triangle_offset(uint32_t place, int I, int rows, int J, int unit) {
  const int tile = J / 2 * kRightTile;
  const uint32_t flip = ((rows & 7) ^ unit ^ (J & 1) * 4) << 4;
  return (place ^ flip) + (tile + (I * kBlock + rows) * 128);
}

__device__ __forceinline__ float& triangle(Triangle& x, uint32_t place, int I, int rows, int J, int unit) {
  return *reinterpret_cast<float*>(x.bytes + triangle_offset(place, I, rows, J, unit));
}

struct Prepare {
  const Params& p;
  SharedMemoryPlan& s;
  uint32_t lane, block, half;
  uint32_t row, t;  // of an MMA fragment: rows `row` and `row + 8`, columns 2t and 2t + 1
  float rate;       // of the head's gate, base 2 and negative
  float2 bias;

  __device__ __forceinline__ Prepare(const Params& params, SharedMemoryPlan& plan) : p(params), s(plan) {
    const int warp = threadIdx.x / kWarp - kFirstPrepareWarp;
    lane = threadIdx.x % kWarp;
    block = warp / 2;
    half = warp % 2;
    row = lane / 4;
    t = lane % 4;
  }

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
  // with itself.
  __device__ __forceinline__ void operands(Slot& slot, const Around& decay, uint32_t (&k_row)[4][4],
                                           uint32_t (&q_row)[4][4], uint32_t (&q_middle)[4][4], float (&L)[2][4],
                                           float (&M)[2][4]) {
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
        K[x] = pack_bf16(kd[x].x * before[c], kd[x].y * before[c + 1]);
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

  // L and M of the block's rows. The two warps of a block exchange what the other one finishes: half 0 L, half 1 M.
  template <int kBlockRow>
  __device__ __forceinline__ void triangles(const uint32_t (&k_row)[4][4], const uint32_t (&q_row)[4][4],
                                            const uint32_t (&q_middle)[4][4], const float (&L_diagonal)[2][4],
                                            const float (&M_diagonal)[2][4], const Factors& f, uint32_t n) {
    float L[kBlockRow + 1][2][4], M[kBlockRow + 1][2][4];
#pragma unroll
    for (int o = 0; o < 2; ++o)
#pragma unroll
      for (int x = 0; x < 4; ++x) L[kBlockRow][o][x] = L_diagonal[o][x], M[kBlockRow][o][x] = M_diagonal[o][x];
    const auto& columns = s.scratch.columns[half];
    if constexpr (kBlockRow == 1) product(L[0], M[0], columns[0], k_row, q_row);
    if constexpr (kBlockRow == 2) {
      product(L[1], M[1], columns[1], k_row, q_row);
      product(L[0], M[0], s.scratch.first_columns[half], k_row, q_row);
    }
    if constexpr (kBlockRow == 3) {
      product(L[2], M[2], columns[2], k_row, q_row);
      uint32_t k_middle[4][4];  // anchored at the middle of the chunk
#pragma unroll
      for (int i = 0; i < 4; ++i) load_fragment(k_middle[i], columns[3], i);
      product(L[1], M[1], columns[1], k_middle, q_middle);
      product(L[0], M[0], s.scratch.first_columns[half], k_middle, q_middle);
    }
    sync_threads(kBarrierPrepare, kPrepareWarps * kWarp);  // all columns are read: the scratch is free
    if (half == 0) {
      exchange<kBlockRow>(M, L, n);
#pragma unroll
      for (int J = 0; J <= kBlockRow; ++J) finish_L(L[J], kBlockRow, J, f);
    } else {
      exchange<kBlockRow>(L, M, n);
#pragma unroll
      for (int J = 0; J <= kBlockRow; ++J) finish_M(M[J], kBlockRow, J);
    }
  }

  template <int kBlockRow>
  __device__ __forceinline__ void exchange(const float (&give)[kBlockRow + 1][2][4], float (&keep)[kBlockRow + 1][2][4],
                                           uint32_t n) {
    constexpr int kFirst = kBlockRow * (kBlockRow + 1) / 2;
#pragma unroll
    for (int J = 0; J <= kBlockRow; ++J)
#pragma unroll
      for (int o = 0; o < 2; ++o)
        *reinterpret_cast<float4*>(s.partial[half][kFirst + J] + o * 512 + lane * 16) = {give[J][o][0], give[J][o][1],
                                                                                         give[J][o][2], give[J][o][3]};
    if (n > 0) {  // X and M of the chunk before are free: R has multiplied with them, and the peer has its copies
      const Own before(n - 1);
      Barrier::wait(&s.bar_own_done[before.stage], before.parity);
      Barrier::wait(&s.bar_peer_done[before.stage], before.parity);
    }
    sync_threads(kBarrierBlock + kBlockRow, 2 * kWarp);
#pragma unroll
    for (int J = 0; J <= kBlockRow; ++J)
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const float4 y = *reinterpret_cast<const float4*>(s.partial[half ^ 1][kFirst + J] + o * 512 + lane * 16);
        keep[J][o][0] += y.x, keep[J][o][1] += y.y, keep[J][o][2] += y.z, keep[J][o][3] += y.w;
      }
  }

  __device__ __forceinline__ void finish_L(float (&x)[2][4], int I, int J, const Factors& f) const {
    const float bk[2] = {f.bk[I * kBlock + row], f.bk[I * kBlock + row + 8]};
    const uint32_t place = triangle_place(row, 0, t);
#pragma unroll
    for (int o = 0; o < 2; ++o)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int i = row + 8 * (e / 2), j = 8 * o + 2 * t + e % 2;
        float l = bk[e / 2] * x[o][e];
        if (I == J)
          l = j < i ? l : 0.f;  // a selection: above the diagonal there may be anything
        else
          l = __uint_as_float(tf32(l));
        triangle(s.X[kOwn], place, I, e / 2 * 8, J, 2 * o + e % 2) = l;
      }
  }

  __device__ __forceinline__ void finish_M(float (&x)[2][4], int I, int J) const {
    uint32_t m[4];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      if (I == J) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (8 * o + 2 * t + e % 2 > row + 8 * (e / 2)) x[o][e] = 0.f;
      }
      m[2 * o] = pack_bf16(x[o][0], x[o][1]);
      m[2 * o + 1] = pack_bf16(x[o][2], x[o][3]);
    }
    const int i = I * kBlock + lane % 16, unit = lane / 16;
    store_matrices(s.M[kOwn].bytes + swizzled(i, 2 * J + unit), m);
  }

  __device__ __forceinline__ void run() {
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      Barrier::wait(&s.bar_qkg_loaded[own.stage], own.parity);
      forget(lane), forget(block), forget(half);
      row = lane / 4, t = lane % 4;
      const Chunk& at = s.own[own.stage];
      if (at.valid == Chunk::kEnd) break;
      load_gate(at.head);
      Slot& slot = s.slots[own.stage];
      Factors& f = s.factors[own.stage];
      if (at.valid < kChunk) Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);  // rows past the end are cleared
      decays(slot);
      sync_threads(kBarrierHalf + half, kWarpgroup);
      forget(lane);
      row = lane / 4, t = lane % 4;
      const Around decay = around(f);
      Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);
      uint32_t k_row[4][4], q_row[4][4], q_middle[4][4];
      float L[2][4], M[2][4];
      operands(slot, decay, k_row, q_row, q_middle, L, M);
      forget(lane), forget(block), forget(half);
      row = lane / 4, t = lane % 4;
      warp_arrive(&s.bar_operands_ready[own.stage]);
      sync_threads(kBarrierHalf + half, kWarpgroup);  // columns of all blocks
      switch (block) {
        case 0:
          triangles<0>(k_row, q_row, q_middle, L, M, f, n);
          break;
        case 1:
          triangles<1>(k_row, q_row, q_middle, L, M, f, n);
          break;
        case 2:
          triangles<2>(k_row, q_row, q_middle, L, M, f, n);
          break;
        default:
          triangles<3>(k_row, q_row, q_middle, L, M, f, n);
          break;
      }
      warp_arrive(&s.bar_LM_ready);
      sync_threads(kBarrierPrepare, kPrepareWarps * kWarp);  // partial sums are read
    }
  }
};

}  // namespace flash_kda
