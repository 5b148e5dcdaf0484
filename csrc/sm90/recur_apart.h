// R in a CTA of its own: 64 value columns of a head of a sequence, from its first chunk to its last one.
#pragma once

#include "recur_parts.h"
#include "ring.h"

namespace flash_kda {

struct RecurApart : RecurParts {
  RecurPlan& s;

  __device__ __forceinline__ RecurApart(const Params& params, RecurPlan& plan, int of_cluster)
      : RecurParts(params, plan.cta, of_cluster), s(plan) {}

  // As in a pair, in an order for which there are registers here: the products for U end before those for the output,
  // and the state decays beside the latter.
  __device__ __forceinline__ void chunk(float (&S)[64], Output& output, unsigned char*& out, int valid,
                                        const Operands& x, const Tile& v, const Factors& f, uint32_t c) const {
    constexpr int kNextHalf = sizeof(x.of[0]);
    float V_part[16], W_part[16], Q_part[16], O[16];
    uint32_t V[8], S16[32], U16[8];
    float2 d[16];
    load_values(V, v, valid);
    load_decay(d, f.decay);  // asked for early, because the answer takes its time
    mark(Stage::kU, c);
    round(S16, S);
    gmma_fence(S);
    gmma_fence(V_part);
    gmma_fence(W_part);
    gmma_fence(Q_part);
    cute::warpgroup_arrive();
    multiply<gmma_atoms::Rows32, 0>(V_part, V, x.X, 0, false);
    multiply<gmma_atoms::Rows32, 0>(V_part, V, x.X, 2, true);
    multiply<gmma_atoms::Rows32, kNextHalf>(W_part, S16, x.of[0].k, 0, false);
    cute::warpgroup_commit_batch();
    multiply<gmma_atoms::Rows32, kNextHalf>(Q_part, S16, x.of[0].q, 0, false);
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    gmma_fence(V_part);
    gmma_fence(W_part);
    mark(Stage::kUpdate, c);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      U16[i] = pack_bf16(V_part[2 * i] - W_part[2 * i], V_part[2 * i + 1] - W_part[2 * i + 1]);
    gmma_fence(U16);
    gmma_fence(O);
    cute::warpgroup_arrive();
    multiply<gmma_atoms::Rows32, 0>(O, U16, x.M, 0, false);
    cute::warpgroup_commit_batch();
    multiply_by(S, d);
    gmma_fence(S);
    cute::warpgroup_arrive();
    const MNMajor Kr(x.g[0].bytes);
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) gmma<gmma_atoms::Transposed>(S, U16 + 4 * k, Kr.at(k * kMNMajorStep), true);
    cute::warpgroup_commit_batch();
    store(output);
    cute::warpgroup_wait<1>();
    gmma_fence(O);
    gmma_fence(Q_part);
    mark(Stage::kOutput, c);
    scale(output, O, Q_part, f.q);
    output.to = out;
    output.valid = valid;
    out += 2 * kChunk * p.out_stride_token;  // of two bytes
    cute::warpgroup_wait<0>();
    gmma_fence(S);
  }

  __device__ __forceinline__ void run() const {
    recur([&](uint32_t c) {
      const Fetched stage(c);
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_loaded[stage.stage], stage.parity);
      return s.chunks[stage.stage];
    }, [&](float (&S)[64], Output& output, unsigned char*& out, const Chunk& at, uint32_t c) {
      const uint32_t stage = Fetched(c).stage;
      chunk(S, output, out, at.valid(), s.operands[stage], s.v[stage], s.factors[stage], c);
      Barrier::arrive(&s.bar_used[stage]);
    });
  }
};

}  // namespace flash_kda
