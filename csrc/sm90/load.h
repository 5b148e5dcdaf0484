// The copies: q, k and g of the chunks that this CTA prepares and v of all chunks from memory, operands to the peer.
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

// One warp, of which one lane loads: q, k, g two chunks ahead of v. All of it works out the norms of q that has come.
struct Load {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  int own = 0;    // chunks that this CTA prepares, so far
  int count = 0;  // chunks with tokens: they go to the two CTAs in turn
  bool end = false;

  enum Result { kNothing, kRows, kLast };

  __device__ __forceinline__ void run() {
    const int lane = threadIdx.x % kWarp;
    Walk::Run run;
    if (lane == 0) {
      s.walk = Walk(s.schedule);
      s.walk.next(p, run);
    }
    for (int c = 0;; ++c) {
      int result = kNothing;
      if (lane == 0) result = step(c, run);
      result = __shfl_sync(~0u, result, 0);
      if (result == kLast) break;
      if (result == kRows) Norms(p, s).q_rows(own++);
    }
  }

  // `run` is at the c-th chunk; then at the next one, worked out ahead of its loads.
  __device__ __forceinline__ Result step(int c, Walk::Run& run) {
    const Chunk& chunk = run.chunk;
    const bool mine = !end && chunk.valid != 0 && (chunk.valid == Chunk::kEnd || count++ % kPair == rank);
    if (mine) load_qkg(chunk);
    if (c >= kValueStages && load_v(c - kValueStages)) return kLast;
    if (end) return kNothing;
    s.chunks[c % kChunks] = chunk;
    end = chunk.valid == Chunk::kEnd;
    if (!end) {
      if (run.more > 0)
        run.advance();
      else
        s.walk.next(p, run);
    }
    return mine && !end ? kRows : kNothing;
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
    const int stage = own % kOwnStages;
    if (own >= kOwnStages) {
      Barrier::wait(&s.bar_own_done[stage], (own / kOwnStages - 1) & 1);
      Barrier::wait(&s.bar_peer_done[stage], (own / kOwnStages - 1) & 1);
    }
    s.own[stage] = chunk;
    uint64_t* barrier = &s.bar_qkg_loaded[stage];
    if (chunk.valid == Chunk::kEnd) return Barrier::arrive(barrier);
    Slot& slot = s.slots[stage];
    Barrier::arrive_and_expect(barrier, sizeof(Slot));
    for (int half = 0; half < 2; ++half) {
      load_tile(p.g, barrier, slot.g[half], chunk, half * kHalf);
      load_tile(p.k, barrier, slot.k[half], chunk, half * kHalf);
      load_tile(p.q, barrier, slot.q[half], chunk, half * kHalf);
    }
  }
};

}  // namespace flash_kda
