// The loads: q, k and g of the chunks that this CTA prepares, v of all chunks; and the norms of q.
#pragma once

#include "norms.h"
#include "plan.h"
#include "ptx.h"

namespace flash_kda {

__device__ __forceinline__ void load_tile(const CUtensorMap& map, uint64_t* barrier, Tile& tile, const Chunk& chunk,
                                          int channel) {
  cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), &tile, channel,
                               chunk.head, int(chunk.token), chunk.batch);
}

// One warp. One lane loads, q, k, g two chunks ahead of v; then all of them work out the norms of the q that has come.
struct Load {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  int n = 0;      // own chunks, so far
  int count = 0;  // chunks with tokens: they go to the two CTAs in turn
  bool end = false;

  enum Then { kGoOn, kNorms, kStop };

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % kWarp;
    Walk::Run run;
    if (lane == 0) {
      s.walk = Walk(s.schedule);
      s.walk.next(p, run);
    }
    for (int c = 0;; ++c) {
      int then = kGoOn;
      if (lane == 0) then = step(c, run);
      then = __shfl_sync(~0u, then, 0);
      if (then == kStop) break;
      if (then == kNorms) q_rows(Own(n++));
    }
  }

  // `run` is at the c-th chunk; then at the next one, worked out ahead of its loads.
  __device__ __forceinline__ Then step(int c, Walk::Run& run) {
    const Chunk& chunk = run.chunk;
    const bool mine = !end && chunk.valid != 0 && (chunk.valid == Chunk::kEnd || count++ % kPair == rank);
    if (mine) load_qkg(chunk);
    if (c >= kValueStages && load_v(c - kValueStages)) return kStop;
    if (end) return kGoOn;
    s.chunks[c % kChunks] = chunk;
    end = chunk.valid == Chunk::kEnd;
    if (!end) {
      if (run.more > 0)
        run.advance();
      else
        s.walk.next(p, run);
    }
    return mine && !end ? kNorms : kGoOn;
  }

  // Of the c-th chunk; whether it is the end.
  __device__ __forceinline__ bool load_v(int c) {
    const Chunk& chunk = s.chunks[c % kChunks];
    const int stage = c % kValueStages;
    if (c >= kValueStages) Barrier::wait(&s.bar_v_done[stage], (c / kValueStages - 1) & 1);
    uint64_t* barrier = &s.bar_v_loaded[stage];
    if (chunk.valid > 0) {
      Barrier::arrive_and_expect(barrier, sizeof(Tile));
      load_tile(p.v, barrier, s.v[stage], chunk, rank * kColumns);
    } else {
      Barrier::arrive(barrier);
    }
    return chunk.valid == Chunk::kEnd;
  }

  __device__ __forceinline__ void load_qkg(const Chunk& chunk) {
    const Own own(n);
    if (n >= kOwnStages) {  // the chunk that was there: multiplied with, here and at the peer, to whom it was sent
      Barrier::wait(&s.bar_own_done[own.stage], own.parity ^ 1);
      Barrier::wait(&s.bar_peer_done[own.stage], own.parity ^ 1);
    }
    s.own[own.stage] = chunk;
    uint64_t* barrier = &s.bar_qkg_loaded[own.stage];
    if (chunk.valid == Chunk::kEnd) return Barrier::arrive(barrier);
    Slot& slot = s.slots[own.stage];
    Barrier::arrive_and_expect(barrier, sizeof(Slot));
    for (int half = 0; half < 2; ++half) {
      load_tile(p.g, barrier, slot.g[half], chunk, half * kHalf);
      load_tile(p.k, barrier, slot.k[half], chunk, half * kHalf);
      load_tile(p.q, barrier, slot.q[half], chunk, half * kHalf);
    }
  }

  // What rows of q are multiplied by. Rows past the end of q and g are cleared here, those of k by the keys' warp.
  __device__ __forceinline__ void q_rows(const Own& own) const {
    const Norms norms;
    Barrier::wait(&s.bar_qkg_loaded[own.stage], own.parity);
    const int valid = s.own[own.stage].valid;
    Slot& slot = s.slots[own.stage];
    if (valid < kChunk) {
      norms.clear_rows(slot.q, valid, 0);
      norms.clear_rows(slot.g, valid, 0xff80ff80u);  // no decay follows from a gate of -inf
    }
    norms.all(slot.q, [&](int i, float x) { s.factors[own.stage].q[i] = p.scale * x; });
    warp_arrive(&s.bar_rows_ready[own.stage]);
  }
};

}  // namespace flash_kda
