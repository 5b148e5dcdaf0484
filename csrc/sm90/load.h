// The loads: q, k and g of the chunks that this CTA prepares, v of all chunks.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

__device__ __forceinline__ void load_tile(const CUtensorMap& map, uint64_t* barrier, Tile& tile, const Chunk& chunk,
                                          int channel) {
  cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), &tile, channel,
                               chunk.head, int(chunk.token), chunk.batch);
}

// One thread. Chunks with tokens go to the two CTAs in turn.
__device__ __forceinline__ void load_qkg(const Params& p, SharedMemoryPlan& s, int rank) {
  Walk walk(s.schedule);
  int count = 0;
  for (int n = 0;;) {  // own chunks
    const Chunk chunk = walk.next(p);
    if (chunk.valid == 0) continue;
    if (chunk.valid != Chunk::kEnd && count++ % kPair != rank) continue;
    const int stage = n % 2, before = (n / 2 - 1) & 1;
    if (n >= kOwnStages) {
      Barrier::wait(&s.bar_own_done[stage], before);
      Barrier::wait(&s.bar_peer_done[stage], before);
    }
    s.own[stage] = chunk;
    uint64_t* barrier = &s.bar_qkg_loaded[stage];
    if (chunk.valid == Chunk::kEnd) {
      Barrier::arrive(barrier);
      break;
    }
    Slot& slot = s.slots[stage];
    TransactionBarrier::arrive_and_expect_tx(barrier, sizeof(Slot));
    for (int half = 0; half < 2; ++half) {
      load_tile(p.g, barrier, slot.g[half], chunk, half * kHalf);
      load_tile(p.k, barrier, slot.k[half], chunk, half * kHalf);
      load_tile(p.q, barrier, slot.q[half], chunk, half * kHalf);
    }
    ++n;
  }
}

// One thread.
__device__ __forceinline__ void load_v(const Params& p, SharedMemoryPlan& s, int rank) {
  Walk walk(s.schedule);
  Ring<kValueStages> ring;
  for (;; ring.next()) {
    const Chunk chunk = walk.next(p);
    Barrier::wait(&s.bar_v_done[ring.stage], ring.parity ^ 1);
    s.chunks[ring.stage] = chunk;
    uint64_t* barrier = &s.bar_v_loaded[ring.stage];
    if (chunk.valid > 0) {
      TransactionBarrier::arrive_and_expect_tx(barrier, sizeof(Tile));
      load_tile(p.v, barrier, s.v[ring.stage], chunk, rank * kColumns);
    } else {
      Barrier::arrive(barrier);
      if (chunk.valid == Chunk::kEnd) break;
    }
  }
}

}  // namespace flash_kda
