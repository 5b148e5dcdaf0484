// What passes from the CTAs that prepare chunks to those that have R, through a ring in device memory.
//
// An item, a head of a sequence, has `slots` places in the ring: its n-th chunk lies in the one n % slots. Each place
// has a flag, how many chunks have come there. Each CTA that has R counts the chunks that it has taken.
#pragma once

#include "load.h"
#include "plan.h"
#include "ptx.h"
#include "ring_schedule.h"
#include "timeline.h"

namespace flash_kda {

// The shared memory of a CTA that has R alone.
struct RecurPlan {
  Operands operands[kFetchedStages];
  Tile v[kFetchedStages];
  Factors factors[kFetchedStages];
  Chunk chunks[kFetchedStages];
  uint32_t cta;  // as in `Schedule`

  // Barriers: what they say (who arrives -> who waits).
  uint64_t bar_loaded[kFetchedStages];  // a chunk, its values and what it is are there (fetch -> R)
  uint64_t bar_used[kFetchedStages];    // R has done with it (R -> fetch)
};
static_assert(sizeof(RecurPlan) <= sizeof(SharedMemoryPlan), "one size for all CTAs");
static_assert(offsetof(RecurPlan, factors) % 16 == 0 && offsetof(RecurPlan, chunks) % 16 == 0, "bulk copies");

// One thread.
__device__ __forceinline__ void init_barriers(RecurPlan& s) {
  for (int i = 0; i < kFetchedStages; ++i) {
    Barrier::init(&s.bar_loaded[i], 1);
    Barrier::init(&s.bar_used[i], kWarpgroup);
  }
  cutlass::arch::fence_barrier_init();
}

// Where R finds its n-th chunk.
struct Fetched {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Fetched(uint32_t n) : stage(n % kFetchedStages), parity(n / kFetchedStages % 2) {}
};

// The places of an item in the ring.
struct Ring {
  unsigned char* chunks;
  uint32_t* ready;
  uint32_t* taken;  // by both CTAs that have R
  uint32_t slots;

  __device__ __forceinline__ Ring(const Params& p, int item, int slots_of_each)
      : chunks(p.ring + int64_t(item) * slots_of_each * kPreparedBytes),
        ready(p.ring_ready + item * slots_of_each),
        taken(p.ring_taken + item * kPair),
        slots(slots_of_each) {}

  // Where a chunk lies, of which so many have come and gone there before it.
  struct Place {
    unsigned char* chunk;
    uint32_t* ready;
    uint32_t before;
  };
  __device__ __forceinline__ Place place(uint32_t n) const {
    const uint32_t slot = n % slots;
    return {chunks + int64_t(slot) * kPreparedBytes, ready + slot, n / slots};
  }

  // The chunk n may be written: both have taken the one that was there.
  __device__ __forceinline__ void wait_free(uint32_t n) const {
    if (n < slots) return;
    // All CTAs that prepare look at the same few places, and have time: without a rest between two looks, they keep R
    // from its chunks.
    for (int i = 0; i < kPair; ++i)
      while (load_acquire(taken + i) + slots <= n) rest(2000);
    fence_async_memory();
  }

  static __device__ __forceinline__ void say_ready(const Place& at) {
    fence_async_memory();
    store_release(at.ready, at.before + 1);
  }

  // How many chunks are there from n on, at least one. A warp looks at as many flags at once: an answer takes its time.
  __device__ __forceinline__ uint32_t wait_ready(uint32_t n) const {
    const uint32_t lane = threadIdx.x % kWarp;
    const Place mine = place(n + lane);
    uint32_t there;
    do {
      there = __ballot_sync(~0u, lane < slots && load_acquire(mine.ready) > mine.before);
    } while (there % 2 == 0);
    fence_async_memory();
    __syncwarp();
    return there == ~0u ? kWarp : __ffs(~there) - 1;
  }

  // This CTA has copied the chunk n out of the ring. The copy has ended: nothing that is written there later can reach
  // it, so the store need not wait for anything.
  __device__ __forceinline__ void say_taken(uint32_t n, int rank) const { store_relaxed(taken + rank, n + 1); }
};

// Loads of a CTA that prepares, the `which`-th of `all`; of others there is only the end. One thread.
struct LoadOwn {
  const Params& p;
  SharedMemoryPlan& s;
  int which, all;

  __device__ __forceinline__ void run() const {
    RingPosition at;
    bool more = s.ring.items > 0 && which < all && at.advance(s.ring, p.heads, which);
    int ends = 0;
    for (uint32_t n = 0; ends < kTeams; ++n) {  // the end is told to each team
      const Own own(n);
      if (n >= kOwnStages) {  // the chunk that was there
        mark(Stage::kWaitFree, kPair * n);
        Barrier::wait(&s.bar_copied[own.stage], own.parity ^ 1);
      }
      mark(Stage::kLoads, kPair * n);
      Scheduler::Run run;
      run.chunk.about = Chunk::kEnd;
      if (more) {
        const RingSchedule::Long& of = s.ring.of[at.which];
        run.start(p, Sequence(p, of.sequence), {of.sequence, at.chunk, at.head}, of.chunks, false);
        s.place[own.stage] = {at.which * p.heads + at.head, at.chunk};
        prefetch_values(run.chunk);
        more = at.advance(s.ring, p.heads, all);
      } else {
        ++ends;
      }
      load_own(p, s, own, run.chunk);
    }
  }

  // Into the second-level cache: R's loads are on the chain from chunk to chunk.
  __device__ __forceinline__ void prefetch_values(const Chunk& chunk) const {
    for (int half = 0; half < 2; ++half) prefetch_tile(p.v, half * kHalf, chunk.head, chunk.token, chunk.batch(p));
  }
};

// Own chunks into the ring, as soon as they are prepared and there is a place. One thread.
struct Send {
  const Params& p;
  SharedMemoryPlan& s;

  __device__ __forceinline__ void run() const {
    for (uint32_t n = 0;; ++n) {
      const Own own(n);
      const uint32_t c = kPair * n;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_prepared[own.stage], own.parity);
      if (seldom(s.own[own.stage].is_end())) break;
      const SharedMemoryPlan::Place place = s.place[own.stage];
      const Ring ring(p, place.item, s.ring.slots);
      mark(Stage::kWaitFree, c);
      ring.wait_free(place.chunk);
      mark(Stage::kCopy, c);
      const Ring::Place to = ring.place(place.chunk);
      store_bulk(to.chunk, &s.operands[own.stage], sizeof(Operands));
      store_bulk(to.chunk + sizeof(Operands), &s.factors[own.stage], sizeof(Factors));
      commit_bulk();
      wait_bulk_read();
      Barrier::arrive(&s.bar_copied[own.stage]);
      wait_bulk();
      Ring::say_ready(to);
    }
  }
};

// Chunks out of the ring, and their values. One warp.
struct Fetch {
  const Params& p;
  RecurPlan& s;
  const Ring& ring;
  int rank;

  __device__ __forceinline__ void run(const RingSchedule::Long& of, int head) const {
    Scheduler::Run run;
    run.start(p, Sequence(p, of.sequence), {of.sequence, 0, head}, of.chunks, false);
    uint32_t there = 0, slot = 0;  // chunks that have come, and n % slots
    for (uint32_t n = 0;; ++n) {
      const Fetched at(n);
      mark(Stage::kWaitFree, n);
      if (n >= kFetchedStages) {
        Barrier::wait(&s.bar_used[at.stage], at.parity ^ 1);
        __syncwarp();  // if one lane went on alone, R could use the next chunk, too, before the others look
        if (threadIdx.x % kWarp == 0) ring.say_taken(n - kFetchedStages, rank);
      }
      mark(Stage::kWaitPrepared, n);
      if (n == there && !run.chunk.is_end()) there += ring.wait_ready(n);
      mark(Stage::kLoads, n);
      if (threadIdx.x % kWarp == 0) load(run.chunk, at.stage, ring.chunks + slot * kPreparedBytes);
      if (seldom(run.chunk.is_end())) break;
      if (++slot == ring.slots) slot = 0;
      if (seldom(run.more == 0))
        run.chunk.about = Chunk::kEnd;
      else
        run.advance(p);
    }
  }

  __device__ __forceinline__ void load(const Chunk& chunk, uint32_t stage, const unsigned char* from) const {
    s.chunks[stage] = chunk;
    uint64_t* const barrier = &s.bar_loaded[stage];
    if (seldom(chunk.is_end())) return Barrier::arrive(barrier);
    Barrier::arrive_and_expect(barrier, kPreparedBytes + sizeof(Tile));
    load_tile(p.v, barrier, s.v[stage], chunk, chunk.batch(p), rank * kColumns);
    load_bulk(&s.operands[stage], from, sizeof(Operands), barrier);
    load_bulk(&s.factors[stage], from + sizeof(Operands), sizeof(Factors), barrier);
  }
};

}  // namespace flash_kda
