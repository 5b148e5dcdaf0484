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

  __device__ __forceinline__ void run() {
    float S[64];
    unsigned char* out = nullptr;
    Output output;
    for (uint32_t c = 0;; ++c) {
      const uint32_t v_stage = c % kValueStages;
      mark(Stage::kWaitValues, c);
      Barrier::wait(&s.bar_v_loaded[v_stage], c / kValueStages % 2);
      forget(warp), forget(thread);
      recompute();
      const Chunk at = s.chunks[c % kChunks];
      const int valid = at.valid();
      if (seldom(at.is_end())) break;
      if (seldom(at.is(Chunk::kFirst))) {
        mark(Stage::kState, c);
        load_state(at, S);
        out = output_of(at);
      }
      if (seldom(at.is(Chunk::kAside))) keep(p.kept, cta, S);
      if (!seldom(valid == 0)) {  // no chunk is empty; without the condition the compiler makes 17 instructions more
        mark(Stage::kWaitPrepared, c);
        const uint32_t n = c / kPair;  // the n-th own one, of this CTA or of the peer
        const Prepared prepared(n, c % kPair == uint32_t(rank));
        wait_prepared(s, prepared, n, rank);
        const Operands& x = s.operands[prepared.stage];
        chunk(S, output, out, valid, x, s.v[v_stage], s.factors[prepared.stage], c,
              [&] { warp_done(&s.bar_v_used[v_stage]); });
        give_back(s, prepared, rank);
      }
      if (seldom(at.about & (Chunk::kLast | Chunk::kCheckpoint))) {
        mark(Stage::kState, c);
        if (at.is(Chunk::kAside)) output.valid = 0;  // the whole chunk writes it
        store(output);
        output.valid = 0;
        store_state(at, S);
        if (at.is(Chunk::kAside)) out = output_of(at);
      }
    }
  }
};

}  // namespace flash_kda
