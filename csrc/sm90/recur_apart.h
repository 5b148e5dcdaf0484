// R in a CTA of its own, in two warpgroups: one has the states, the other the outputs. Both work on the same 64 value
// columns.
//
// The outputs are off the chain from one state to the next: for them S and U go through shared memory, rounded as
// operands are.
#pragma once

#include "recur_parts.h"
#include "ring.h"

namespace flash_kda {

// The chain: U, and the state.
struct RecurStates : RecurParts {
  RecurPlan& s;

  __device__ __forceinline__ RecurStates(const Params& params, RecurPlan& plan, int of_cluster)
      : RecurParts(params, plan.cta, of_cluster), s(plan) {}

  // This warp's rows of S^T or U^T, sixteen channels or tokens.
  __device__ __forceinline__ void give(RecurPlan::Rows& to, uint32_t unit, const uint32_t* x) const {
    const uint32_t registers[4] = {x[0], x[1], x[2], x[3]};
    store_matrices(to.bytes + swizzled(16 * warp + matrix_row(), unit + matrix_unit()), registers);
  }

  // What a chunk begins with: loaded together, because each load takes its time.
  struct Begin {
    uint32_t V[8];
    float2 decay[16];
  };
  __device__ __forceinline__ void begin(Begin& x, const Turn<kStatesStages>& at) const {
    load_matrices_of_values(x.V, s.of_states[at.stage].v);
    load_decay(x.decay, s.decay[at.stage]);
  }

  __device__ __forceinline__ void chunk(float (&S)[64], const Begin& begin, const Turn<kStatesStages>& at,
                                        uint32_t c) {
    const RecurPlan::OfStates& x = s.of_states[at.stage];
    const uint32_t buffer = c % kGivenBuffers, buffer_parity = c / kGivenBuffers % 2;
    float V_part[16], S_part[16];
    uint32_t S16[32], U16[8];
    gmma_fence(V_part);
    cute::warpgroup_arrive();
    // U^T = V^T (X b)^T - S^T W^T
    multiply<gmma_atoms::Rows32, 0>(V_part, begin.V, x.X, 0, false);
    multiply<gmma_atoms::Rows32, 0>(V_part, begin.V, x.X, 2, true);
    cute::warpgroup_commit_batch();
    mark(Stage::kU, c);
    round(S16, S);
    gmma_fence(S_part);
    cute::warpgroup_arrive();
    multiply<gmma_atoms::Rows32, sizeof(Tile)>(S_part, S16, x.W[0], 0, false);
    cute::warpgroup_commit_batch();
    if (c > 0) give_last(c);
    multiply_by(S, begin.decay);
    cute::warpgroup_wait<0>();
    gmma_fence(V_part);
    gmma_fence(S_part);
    mark(Stage::kUpdate, c);
#pragma unroll
    for (int i = 0; i < 8; ++i) U16[i] = pack_bf16(V_part[2 * i] - S_part[2 * i], V_part[2 * i + 1] - S_part[2 * i + 1]);
    gmma_fence(U16);
    gmma_fence(S);
    cute::warpgroup_arrive();
    // S^T = S^T exp(G_C) + U^T Kr
    const MNMajor Kr(x.Kr[0].bytes);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) gmma<gmma_atoms::Transposed>(S, U16 + 4 * k, Kr.at(k * kMNMajorStep), true);
    cute::warpgroup_commit_batch();
    // Beside the update: S as it was, and U, for the outputs
    if (c >= kGivenBuffers) Barrier::wait(&s.bar_taken[buffer], buffer_parity ^ 1);
#pragma unroll
    for (int k = 0; k < 8; ++k) give(s.S[buffer][k / 4], k % 4 * 2, S16 + 4 * k);
#pragma unroll
    for (int k = 0; k < 2; ++k) give(s.U, 4 * buffer + 2 * k, U16 + 4 * k);
    cute::warpgroup_wait<0>();
    gmma_fence(S);
  }

  // What was written for the outputs in the chunk before the c-th one. Later than it was written, because the fence
  // waits for it: here there is something else to wait for.
  __device__ __forceinline__ void give_last(uint32_t c) const { warp_arrive(&s.bar_given[(c - 1) % kGivenBuffers]); }

  __device__ __forceinline__ void run() {
    float S[64];
    for (uint32_t c = 0;; ++c) {
      const Turn<kStatesStages> stage(c);
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_states_loaded[stage.stage], stage.parity);
      const Chunk at = s.states_chunks[stage.stage];
      Begin x;
      begin(x, stage);
      const int valid = at.valid();
      if (seldom(at.is_end())) {
        give_last(c);
        break;
      }
      if (seldom(valid < kChunk)) clear_values(x.V, valid);
      if (seldom(at.is(Chunk::kFirst))) {
        mark(Stage::kState, c);
        load_state(at, S);
      }
      if (seldom(at.is(Chunk::kAside))) keep(p.kept, cta, S);
      chunk(S, x, stage, c);
      warp_done(&s.bar_states_used[stage.stage]);
      if (seldom(at.about & (Chunk::kLast | Chunk::kCheckpoint))) {
        mark(Stage::kState, c);
        store_state(at, S);
      }
    }
  }
};

// O^T = S^T Q~^T + U^T M^T.
struct RecurOutputs : RecurParts {
  RecurPlan& s;

  __device__ __forceinline__ RecurOutputs(const Params& params, RecurPlan& plan, int of_cluster)
      : RecurParts(params, plan.cta, of_cluster), s(plan) {}

  __device__ __forceinline__ void run() {
    for (uint32_t c = 0;; ++c) {
      const Turn<kOutputsStages> stage(c);
      const uint32_t buffer = c % kGivenBuffers, buffer_parity = c / kGivenBuffers % 2;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_outputs_loaded[stage.stage], stage.parity);
      const Chunk at = s.outputs_chunks[stage.stage];
      if (seldom(at.is_end())) break;
      const RecurPlan::OfOutputs& x = s.of_outputs[stage.stage];
      const KMajor Q[2] = {KMajor(x.Q[0].bytes), KMajor(x.Q[1].bytes)}, M(x.M.bytes);
      const KMajor S[2] = {KMajor(s.S[buffer][0].bytes), KMajor(s.S[buffer][1].bytes)}, U(s.U.bytes);
      float S_part[16], U_part[16];
      Barrier::wait(&s.bar_given[buffer], buffer_parity);
      mark(Stage::kOutput, c);
      gmma_fence(S_part);
      gmma_fence(U_part);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 8; ++k)
        gmma_shared<gmma_atoms::Shared32>(S_part, S[k / 4].at(k % 4 * kKMajorStep), Q[k / 4].at(k % 4 * kKMajorStep),
                                          k > 0);
#pragma unroll
      for (int k = 0; k < 2; ++k)
        gmma_shared<gmma_atoms::Shared32>(U_part, U.at((2 * buffer + k) * kKMajorStep), M.at(k * kKMajorStep), k > 0);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      gmma_fence(S_part);
      gmma_fence(U_part);
      warp_done(&s.bar_taken[buffer]);
      Output output;
      scale(output, U_part, S_part, s.q[stage.stage]);
      warp_done(&s.bar_outputs_used[stage.stage]);
      output.to = output_of(at);
      output.valid = at.is(Chunk::kAside) ? 0 : at.valid();  // the whole chunk writes it
      store(output);
    }
  }
};

}  // namespace flash_kda
