// R in a CTA of its own: 64 value columns of a head of a sequence, from its first chunk to its last one.
#pragma once

#include "recur_parts.h"
#include "ring.h"

namespace flash_kda {

struct RecurApart : RecurParts {
  RecurPlan& s;

  __device__ __forceinline__ RecurApart(const Params& params, RecurPlan& plan, int of_cluster)
      : RecurParts(params, plan.cta, of_cluster), s(plan) {}

  __device__ __forceinline__ void run() const {
    float S[64];
    unsigned char* out = nullptr;
    Output output;
    for (uint32_t c = 0;; ++c) {
      const Fetched stage(c);
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_loaded[stage.stage], stage.parity);
      const Chunk at = s.chunks[stage.stage];
      if (seldom(at.is_end())) break;
      if (seldom(at.is(Chunk::kFirst))) {
        mark(Stage::kState, c);
        load_state(at, S);
        out = output_of(at);
      }
      if (seldom(at.is(Chunk::kAside))) keep(p.kept, cta, S);
      chunk(S, output, out, at.valid(), s.operands[stage.stage], s.v[stage.stage], s.factors[stage.stage], c, [] {});
      warp_done(&s.bar_used[stage.stage]);
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
