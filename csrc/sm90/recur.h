// R: W, U, the output and the state, chunk after chunk. One warpgroup has 64 value columns.
//
// Everything is transposed, so that every left operand is already in registers: value columns are the rows of the
// accumulators, and an accumulator fragment has, k-step by k-step, the order of the next left operand.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

// Tiles of the plan as right operands: K~, Q~, X and M with their rows as columns of the product, Kr with its columns.
using KMajor = RightOperand<16, 1024>;  // the first number means nothing here
using MNMajor = RightOperand<kTileBytes, 1024>;

// One thread, before the peer may send the next chunk.
__device__ __forceinline__ void expect_from_peer(SharedMemoryPlan& s) {
  Barrier::arrive_and_expect(&s.bar_received, kReceivedBytes);
  Barrier::arrive_and_expect(&s.bar_X_received, kReceivedXBytes);
}

struct Recur {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  uint32_t thread, warp, lane, row, t;

  __device__ __forceinline__ Recur(const Params& params, SharedMemoryPlan& plan, int of_cluster)
      : p(params), s(plan), rank(of_cluster) {
    thread = threadIdx.x;
    warp = thread / kWarp;
    lane = thread % kWarp;
    row = lane / 4;
    t = lane % 4;
  }

  static __device__ __forceinline__ void sync() { sync_threads(kBarrierRecur, kWarpgroup); }

  // The state ---------------------------------------------------------------------------------------------------------
  //
  // S^T: S[4j + 0..1] are columns (value) 16 * warp + row, channels 8j + 2t + 0..1; S[4j + 2..3] value column + 8.

  __device__ __forceinline__ int value_column(int r) const { return rank * kColumns + 16 * warp + row + 8 * r; }

  __device__ __forceinline__ void load_state(const Chunk& at, float (&S)[64]) const {
    if (!at.begins) return take_over(S);
    if (p.initial_state == nullptr) {
#pragma unroll
      for (int i = 0; i < 64; ++i) S[i] = 0.f;
      return;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = at.sequence * p.initial_stride_sequence + at.head * p.initial_stride_head +
                             value_column(r) * p.initial_stride_value + 2 * t;
      const float* const fp32 = static_cast<const float*>(p.initial_state) + offset;
      const uint16_t* const bf16 = static_cast<const uint16_t*>(p.initial_state) + offset;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float2 x = p.initial_is_fp32 ? *reinterpret_cast<const float2*>(fp32 + 8 * j)
                                           : unpack_bf16(*reinterpret_cast<const uint32_t*>(bf16 + 8 * j));
        S[4 * j + 2 * r] = x.x;
        S[4 * j + 2 * r + 1] = x.y;
      }
    }
  }

  __device__ __forceinline__ void store_state(const Chunk& at, const float (&S)[64]) const {
    if (!at.ends) return hand_over(S);
    if (p.final_state == nullptr) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t offset = at.sequence * p.final_stride_sequence + at.head * p.final_stride_head +
                             value_column(r) * p.final_stride_value + 2 * t;
      float* const fp32 = static_cast<float*>(p.final_state) + offset;
      uint16_t* const bf16 = static_cast<uint16_t*>(p.final_state) + offset;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const float x = S[4 * j + 2 * r], y = S[4 * j + 2 * r + 1];
        if (p.final_is_fp32)
          *reinterpret_cast<float2*>(fp32 + 8 * j) = {x, y};
        else
          *reinterpret_cast<uint32_t*>(bf16 + 8 * j) = pack_bf16(x, y);
      }
    }
  }

  // A sequence that goes on in the next cluster: its state, through memory.
  __device__ __forceinline__ void hand_over(const float (&S)[64]) const {
    const uint32_t cta = s.schedule.cta;
    float4* state = reinterpret_cast<float4*>(p.handover) + int64_t(cta) * 16 * kWarpgroup;
#pragma unroll
    for (int i = 0; i < 16; ++i) state[i * kWarpgroup + thread] = {S[4 * i], S[4 * i + 1], S[4 * i + 2], S[4 * i + 3]};
    __threadfence();
    sync();
    if (thread == 0) store_release(p.handed_over + cta, 1);
  }

  // From the cluster before: it is running or has ended.
  __device__ __forceinline__ void take_over(float (&S)[64]) const {
    const uint32_t from = s.schedule.cta - kPair;
    if (thread == 0)
      while (!load_acquire(p.handed_over + from)) {
      }
    sync();
    const float4* state = reinterpret_cast<const float4*>(p.handover) + int64_t(from) * 16 * kWarpgroup;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 x = __ldcg(state + i * kWarpgroup + thread);
      S[4 * i] = x.x, S[4 * i + 1] = x.y, S[4 * i + 2] = x.z, S[4 * i + 3] = x.w;
    }
  }

  // A chunk -----------------------------------------------------------------------------------------------------------

  // 16-byte unit of the value tile that this lane names in ldmatrix and stmatrix: tokens 16 * i .. 16 * i + 15.
  __device__ __forceinline__ unsigned char* value_row(Tile& tile, int i) const {
    return tile.bytes + swizzled(16 * i + 8 * (lane / 16) + lane % 8, 2 * warp + (lane / 8) % 2);
  }

  // Rows past the end may hold anything, NaN included.
  __device__ __forceinline__ void clear_values(Tile& v, int valid) const {
    for (int i = valid + thread / 8; i < kChunk; i += kWarpgroup / 8)
      *reinterpret_cast<uint4*>(v.bytes + i * 128 + thread % 8 * 16) = {0, 0, 0, 0};
    sync();
  }

  // (K~ S)^T = S^T K~^T and O^T = S^T Q~^T; and S^T exp(G_C), in place.
  __device__ __forceinline__ void multiply_state(float (&KS)[32], float (&O)[32], float (&S)[64], const Slot& slot,
                                                 const Factors& f) const {
    uint32_t S16[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) S16[i] = pack_bf16(S[2 * i], S[2 * i + 1]);
#pragma unroll
    for (int j = 0; j < 16; ++j) {  // X is still being inverted: there is time
      const float2 d = *reinterpret_cast<const float2*>(f.decay + 8 * j + 2 * t);
      S[4 * j] *= d.x;
      S[4 * j + 1] *= d.y;
      S[4 * j + 2] *= d.x;
      S[4 * j + 3] *= d.y;
    }
    gmma_fence(S);  // else the compiler moves the products behind the wait for X
    gmma_fence(KS);
    gmma_fence(O);
    const KMajor K(slot.k), Q(slot.q);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 8; ++k)
      gmma<gmma_atoms::Bf16, 64>(KS, S16[4 * k], S16[4 * k + 1], S16[4 * k + 2], S16[4 * k + 3],
                                 K.at(k / 4 * kTileBytes + 32 * (k % 4)), k > 0);
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int k = 0; k < 8; ++k)
      gmma<gmma_atoms::Bf16, 64>(O, S16[4 * k], S16[4 * k + 1], S16[4 * k + 2], S16[4 * k + 3],
                                 Q.at(k / 4 * kTileBytes + 32 * (k % 4)), k > 0);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    gmma_fence(KS);
    gmma_fence(O);
  }

  // W^T = b V^T - b kn (K~ S)^T, in the place of (K~ S)^T. The tensor cores truncate it to tf32.
  __device__ __forceinline__ void stage_W(float (&W)[32], Tile& v, const Factors& f) const {
    uint32_t V[16];  // tokens 8j + 2t, 8j + 2t + 1 of the two value columns: V[2j], V[2j + 1]
#pragma unroll
    for (int i = 0; i < 4; ++i) load_matrices_transposed(V + 4 * i, value_row(v, i));
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 b = *reinterpret_cast<const float2*>(f.b + 8 * j + 2 * t);
      const float2 bk = *reinterpret_cast<const float2*>(f.bk + 8 * j + 2 * t);
      const float2 v0 = unpack_bf16(V[2 * j]), v1 = unpack_bf16(V[2 * j + 1]);
      W[4 * j] = fmaf(-bk.x, W[4 * j], b.x * v0.x);
      W[4 * j + 1] = fmaf(-bk.y, W[4 * j + 1], b.y * v0.y);
      W[4 * j + 2] = fmaf(-bk.x, W[4 * j + 2], b.x * v1.x);
      W[4 * j + 3] = fmaf(-bk.y, W[4 * j + 3], b.y * v1.y);
    }
  }

  // U^T = W^T X^T, rounded to bf16. Two halves, since X has no right upper quarter.
  __device__ __forceinline__ void stage_U(uint32_t (&U16)[16], float (&W)[32], const Triangle& X) const {
    float U[2][16];
    gmma_fence(W);
    gmma_fence(U[0]);
    gmma_fence(U[1]);
    const KMajor X_right(X.bytes);
    cute::warpgroup_arrive();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int k = 0; k < 4 + 4 * half; ++k)
        gmma<gmma_atoms::Tf32, 32>(U[half], __float_as_uint(W[4 * k]), __float_as_uint(W[4 * k + 2]),
                                   __float_as_uint(W[4 * k + 1]), __float_as_uint(W[4 * k + 3]),
                                   X_right.at((half + k / 4) * (kTileBytes / 2) + 32 * (k % 4)), k > 0);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    gmma_fence(U[0]);
    gmma_fence(U[1]);
#pragma unroll
    for (int i = 0; i < 16; ++i) U16[i] = pack_bf16(U[i / 8][2 * i % 16], U[i / 8][2 * i % 16 + 1]);
  }

  // O^T += U^T M^T, put into the tile of v meanwhile; S^T += U^T Kr.
  __device__ __forceinline__ void output_and_state(float (&O)[32], float (&S)[64], uint32_t (&U16)[16],
                                                   const Slot& slot, const Factors& f, const Tile& M, Tile& v) const {
    gmma_fence(U16);
    gmma_fence(O);
    gmma_fence(S);
    const KMajor M_right(M.bytes);
    const MNMajor Kr(slot.g);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      gmma<gmma_atoms::Bf16, 64>(O, U16[4 * k], U16[4 * k + 1], U16[4 * k + 2], U16[4 * k + 3], M_right.at(32 * k),
                                 true);
    cute::warpgroup_commit_batch();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      gmma<gmma_atoms::Bf16Transposed, 128>(S, U16[4 * k], U16[4 * k + 1], U16[4 * k + 2], U16[4 * k + 3],
                                            Kr.at(2048 * k), true);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    gmma_fence(O);
    put_output(O, f, v);
    cute::warpgroup_wait<0>();
    gmma_fence(S);
  }

  // The output goes through the value tile, which this chunk no longer needs: each warp writes where it alone has read.
  __device__ __forceinline__ void put_output(const float (&O)[32], const Factors& f, Tile& tile) const {
    uint32_t o[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 q = *reinterpret_cast<const float2*>(f.q + 8 * j + 2 * t);
      o[2 * j] = pack_bf16(O[4 * j] * q.x, O[4 * j + 1] * q.y);
      o[2 * j + 1] = pack_bf16(O[4 * j + 2] * q.x, O[4 * j + 3] * q.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_matrices_transposed(value_row(tile, i), o + 4 * i);
  }

  __device__ __forceinline__ void chunk(float (&S)[64], const Chunk& at, const Slot& slot, const Factors& f,
                                        const Triangle& X, const Tile& M, uint64_t* X_ready, int X_parity, Tile& v) {
    float W[32], O[32];
    uint32_t U[16];
    multiply_state(W, O, S, slot, f);
    if (at.valid < kChunk) clear_values(v, at.valid);
    stage_W(W, v, f);
    Barrier::wait(X_ready, X_parity);
    stage_U(U, W, X);
    output_and_state(O, S, U, slot, f, M, v);
  }

  __device__ __forceinline__ void store_output(const Chunk& at, const Tile& tile) const {
    const int token = thread / 8, unit = thread % 8;
    uint16_t* out = p.out + at.batch * p.out_stride_batch + (at.token + token) * p.out_stride_token +
                    at.head * p.out_stride_head + rank * kColumns + unit * 8;
    sync();
    uint4 x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const uint4*>(tile.bytes + swizzled(16 * i + token, unit));
    fence_async();  // TMA may write the tile next. Before the stores: it waits for those
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (16 * i + token < at.valid) __stcg(reinterpret_cast<uint4*>(out + 16 * i * p.out_stride_token), x[i]);
  }

  __device__ __forceinline__ void run() {
    float S[64];
    for (uint32_t c = 0, count = 0;; ++c) {  // of all chunks, and of those with tokens
      const uint32_t v_stage = c % kValueStages;
      Barrier::wait(&s.bar_v_loaded[v_stage], c / kValueStages % 2);
      forget(warp), forget(lane), forget(row), forget(t);
      const Chunk& at = s.chunks[c % kChunks];
      if (at.valid == Chunk::kEnd) break;
      if (at.first) load_state(at, S);
      if (at.valid > 0) {
        const bool own = count % kPair == uint32_t(rank);
        const uint32_t n = count / kPair;  // the n-th own one, of this CTA or of the peer
        const Own at_owner(n);
        const uint32_t slot = own ? at_owner.stage : kReceivedSlot;
        if (own)
          Barrier::wait(&s.bar_operands_ready[at_owner.stage], at_owner.parity);
        else
          Barrier::wait(&s.bar_received, n % 2);
        const int of = own ? kOwn : kReceived;
        chunk(S, at, s.slots[slot], s.factors[slot], s.X[of], s.M[of], own ? &s.bar_X_ready : &s.bar_X_received, n % 2,
              s.v[v_stage]);
        if (own) {
          warp_done(&s.bar_own_done[at_owner.stage]);
        } else {
          // All reads of what came are complete here, not only begun: wgmma's by its wait, those of factors because
          // their values were used. The arrival alone does not order them before the peer's next copies.
          if (thread == 0) expect_from_peer(s);
          __syncwarp();
          Barrier::arrive(&s.bar_peer_done[at_owner.stage], rank ^ 1, lane == 0);
        }
        store_output(at, s.v[v_stage]);
        ++count;
      }
      if (at.last) store_state(at, S);
      warp_done(&s.bar_v_done[v_stage]);
    }
  }
};

}  // namespace flash_kda
