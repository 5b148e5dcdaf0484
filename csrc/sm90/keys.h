// The keys: norms of k and beta of the chunks that this CTA prepares, and what P has prepared to the peer.
#pragma once

#include "norms.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

// One warp.
struct Keys {
  const Params& p;
  SharedMemoryPlan& s;

  __device__ __forceinline__ void rows(const Norms& norms, uint32_t stage) const {
    const Chunk& at = s.own[stage];
    const int valid = at.valid;
    const uint32_t lane = norms.lane;
    Factors& f = s.factors[stage];
    // Asked for first: memory takes as long to answer as the norms do.
    uint32_t logit[kChunk / kWarp];
#pragma unroll
    for (int i = 0; i < kChunk / kWarp; ++i)
      logit[i] = p.beta[at.batch * p.beta_stride_batch +
                        (at.token + min(int(lane) + i * kWarp, valid - 1)) * p.beta_stride_token +
                        at.head * p.beta_stride_head];
    if (valid < kChunk) norms.clear_rows(s.slots[stage].k, valid, 0);
    norms.all(s.slots[stage].k, [&](int i, float x) { s.kn[stage][i] = x; });
#pragma unroll
    for (int i = 0; i < kChunk / kWarp; ++i) {
      const int token = lane + i * kWarp;
      const float x = token < valid ? unpack_bf16(logit[i]).x : -INFINITY;
      const float b = reciprocal_approx(1.f + exp2_approx(-kLog2E * x));
      f.b[token] = b;
      f.bk[token] = b * s.kn[stage][token];
    }
    warp_arrive(&s.bar_rows_ready[stage]);
  }

  __device__ __forceinline__ void run() const {
    Norms norms;
    for (uint32_t n = 0;; ++n) {  // own chunks
      const Own own(n);
      Barrier::wait(&s.bar_qkg_loaded[own.stage], own.parity);
      norms.recompute();
      if (s.own[own.stage].valid == Chunk::kEnd) break;
      rows(norms, own.stage);
      Barrier::wait(&s.bar_operands_ready[own.stage], own.parity);
      if (n > 0) Barrier::wait(&s.bar_peer_done[Own(n - 1).stage], Own(n - 1).parity);
      if (norms.lane == 0) {
        send(&s.slots[own.stage], &s.slots[kReceivedSlot], sizeof(Slot), &s.bar_received);
        send(&s.factors[own.stage], &s.factors[kReceivedSlot], sizeof(Factors), &s.bar_received);
      }
      __syncwarp();
    }
  }
};

}  // namespace flash_kda
