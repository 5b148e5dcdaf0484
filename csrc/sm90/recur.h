// R: U, the output and the state, chunk after chunk, in one warpgroup.
#pragma once

#include "pair.h"
#include "recur_parts.h"
#include "timeline.h"

namespace flash_kda {

struct Recur : RecurParts {
  SharedMemoryPlan& s;

  __device__ __forceinline__ Recur(const Params& params, SharedMemoryPlan& plan, int of_cluster)
      : RecurParts(params, plan.schedule.cta, of_cluster), s(plan) {}

  // U, the output and the state.
  __device__ __forceinline__ void chunk(float (&S)[64], Output& output, unsigned char*& out, int valid,
                                        uint32_t v_stage, uint32_t stage, uint32_t c) const {
    const Operands& x = s.operands[stage];
    const Factors& f = s.factors[stage];
    constexpr int kNextHalf = sizeof(x.of[0]);
    float V_part[16], OU[32], O[16];
    uint32_t V[8], S16[32], U16[8];
    float2 d[16];
    load_values(V, s.v[v_stage], valid);
    load_decay(d, f.decay);  // asked for early, because the answer takes its time
    warp_done(&s.bar_v_used[v_stage]);
    mark(Stage::kU, c);
    round(S16, S);
    multiply_by(S, d);
    gmma_fence(S);
    gmma_fence(V_part);
    gmma_fence(OU);
    cute::warpgroup_arrive();
    // U^T = V^T (X b)^T - S^T W^T, and O^T = S^T Q~^T beside it
    multiply<gmma_atoms::Rows32, 0>(V_part, V, x.X, 0, false);
    multiply<gmma_atoms::Rows32, 0>(V_part, V, x.X, 2, true);
    multiply<gmma_atoms::Rows64, kNextHalf>(OU, S16, x.of[0].q, 0, false);
    cute::warpgroup_commit_batch();
    store(output);
    cute::warpgroup_wait<0>();
    gmma_fence(V_part);
    gmma_fence(OU);
    mark(Stage::kUpdate, c);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      U16[i] = pack_bf16(V_part[2 * i] - OU[16 + 2 * i], V_part[2 * i + 1] - OU[16 + 2 * i + 1]);
    gmma_fence(U16);
    gmma_fence(O);
    gmma_fence(S);
    cute::warpgroup_arrive();
    // O^T = S^T Q~^T + U^T M^T, the second part
    multiply<gmma_atoms::Rows32, 0>(O, U16, x.M, 0, false);
    cute::warpgroup_commit_batch();
    // S^T = S^T exp(G_C) + U^T Kr
    const MNMajor Kr(x.g[0].bytes);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) gmma<gmma_atoms::Transposed>(S, U16 + 4 * k, Kr.at(k * kMNMajorStep), true);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    gmma_fence(O);
    mark(Stage::kOutput, c);
    scale(output, O, OU, f.q);
    output.to = out;
    output.valid = valid;
    out += 2 * kChunk * p.out_stride_token;  // of two bytes
    cute::warpgroup_wait<0>();
    gmma_fence(S);
  }

  __device__ __forceinline__ void run() {
    Prepared prepared(rank);
    recur([&](uint32_t c) {
      mark(Stage::kWaitValues, c);
      Barrier::wait(&s.bar_v_loaded[c % kValueStages], c / kValueStages % 2);
      forget(warp), forget(thread);
      recompute();
      return s.chunks[c % kChunks];
    }, [&](float (&S)[64], Output& output, unsigned char*& out, const Chunk& at, uint32_t c) {
      mark(Stage::kWaitPrepared, c);
      wait_prepared(s, prepared, rank);
      chunk(S, output, out, at.valid(), c % kValueStages, prepared.stage(), c);
      give_back(s, prepared, rank);
      prepared.advance(c);
    });
  }
};

}  // namespace flash_kda
