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

constexpr int kStatesStages = 5;
constexpr int kOutputsStages = 4;
constexpr int kGivenBuffers = 2;
static_assert(kRingSlots / kMostItems >= kOutputsStages, "a chunk is taken when the next one has its stage");

// The shared memory of a CTA that has R alone. One warpgroup of R has the states, the other the outputs
// (recur_apart.h): each frees what it needs of a chunk as early as it can.
struct RecurPlan {
  struct OfStates {
    Tile W[2], X, Kr[2], v;
  };
  struct OfOutputs {
    Tile Q[2], M;
  };
  // bf16 [64 value columns, 64 channels], rows of 128 bytes, 128-byte swizzle.
  struct alignas(1024) Rows {
    unsigned char bytes[kColumns * 128];
  };
  OfStates of_states[kStatesStages];
  OfOutputs of_outputs[kOutputsStages];
  Rows S[kGivenBuffers][2];  // S^T, rounded, for each half of the channels
  Rows U;                    // U^T, [64 value columns, 32 tokens], the buffers side by side
  float decay[kStatesStages][kHeadDim];
  float q[kOutputsStages][kChunk];
  Chunk states_chunks[kStatesStages];
  Chunk outputs_chunks[kOutputsStages];
  uint32_t cta;  // as in `Schedule`

  // Barriers: what they say (who arrives -> who waits).
  uint64_t bar_states_loaded[kStatesStages];    // what the states need of a chunk is there (fetch -> states)
  uint64_t bar_states_used[kStatesStages];      // it may be overwritten (states -> fetch)
  uint64_t bar_outputs_loaded[kOutputsStages];  // the same for the outputs
  uint64_t bar_outputs_used[kOutputsStages];
  uint64_t bar_given[kGivenBuffers];  // S and U are in shared memory (states -> outputs)
  uint64_t bar_taken[kGivenBuffers];  // both have been multiplied by (outputs -> states)
};
static_assert(sizeof(RecurPlan) <= sizeof(SharedMemoryPlan), "one size for all CTAs");
static_assert(offsetof(RecurPlan, decay) % 16 == 0 && offsetof(RecurPlan, states_chunks) % 16 == 0, "bulk copies");

// One thread.
__device__ __forceinline__ void init_barriers(RecurPlan& s) {
  for (int i = 0; i < kStatesStages; ++i) {
    Barrier::init(&s.bar_states_loaded[i], 1);
    Barrier::init(&s.bar_states_used[i], kRecurWarps);
  }
  for (int i = 0; i < kOutputsStages; ++i) {
    Barrier::init(&s.bar_outputs_loaded[i], 1);
    Barrier::init(&s.bar_outputs_used[i], kRecurWarps);
  }
  for (int i = 0; i < kGivenBuffers; ++i) {
    Barrier::init(&s.bar_given[i], kRecurWarps);
    Barrier::init(&s.bar_taken[i], kRecurWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// Where the n-th chunk is that takes turns in so many stages.
template <int kCount>
struct Turn {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Turn(uint32_t n) : stage(n % kCount), parity(n / kCount % 2) {}
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
    for (int i = 0; i < kPair; ++i)
      while (load_acquire(taken + i) + slots <= n) {
      }
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

// Loads of a CTA that prepares, the `which`-th of `all`. One thread.
struct LoadOwn {
  const Params& p;
  SharedMemoryPlan& s;
  int which, all;

  __device__ __forceinline__ void run() const {
    RingPosition at;
    bool more = at.advance(s.ring, p.heads, which);
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
      mark(Stage::kWaitChunk, c);
      Barrier::wait(&s.bar_loaded[own.parity][own.stage], own.loaded_parity);
      if (seldom(s.own[own.stage].is_end())) break;
      const SharedMemoryPlan::Place place = s.place[own.stage];
      const Ring ring(p, place.item, s.ring.slots);
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_prepared[own.stage], own.parity);
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

// What one warpgroup of R needs of each chunk, out of the ring. One warp.
//
// `Of` says which part: `kStages`, the barriers, where it is told what the chunk is, and `load`.
template <class Of>
struct Fetch : Of {
  const Params& p;
  const Ring ring;

  __device__ __forceinline__ void run(const RingSchedule::Long& of, int head) const {
    Scheduler::Run run;
    run.start(p, Sequence(p, of.sequence), {of.sequence, 0, head}, of.chunks, false);
    uint32_t there = 0, slot = 0;  // chunks that have come, and n % slots
    for (uint32_t n = 0;; ++n) {
      const Turn<Of::kStages> at(n);
      mark(Stage::kWaitFree, n);
      if (n >= Of::kStages) {
        Barrier::wait(this->used(at.stage), at.parity ^ 1);
        this->say_used(ring, n - Of::kStages);
      }
      if (seldom(run.chunk.is_end())) {
        this->chunk(at.stage) = run.chunk;
        warp_done(this->loaded(at.stage));
        break;
      }
      mark(Stage::kWaitPrepared, n);
      if (n == there) there += ring.wait_ready(n);
      mark(Stage::kLoads, n);
      if (threadIdx.x % kWarp == 0) {
        this->chunk(at.stage) = run.chunk;
        this->load(p, at.stage, run.chunk, ring.chunks + slot * kPreparedBytes);
      }
      if (++slot == ring.slots) slot = 0;
      if (seldom(run.more == 0))
        run.chunk.about = Chunk::kEnd;
      else
        run.advance(p);
    }
  }
};

struct StatesPart {
  static constexpr int kStages = kStatesStages;
  RecurPlan& s;
  int rank;

  __device__ __forceinline__ uint64_t* loaded(uint32_t stage) const { return &s.bar_states_loaded[stage]; }
  __device__ __forceinline__ uint64_t* used(uint32_t stage) const { return &s.bar_states_used[stage]; }
  __device__ __forceinline__ Chunk& chunk(uint32_t stage) const { return s.states_chunks[stage]; }
  __device__ __forceinline__ void say_used(const Ring&, uint32_t) const {}

  __device__ __forceinline__ void load(const Params& p, uint32_t stage, const Chunk& chunk,
                                       const unsigned char* from) const {
    uint64_t* const barrier = loaded(stage);
    RecurPlan::OfStates& to = s.of_states[stage];
    Barrier::arrive_and_expect(barrier, sizeof(to) + sizeof(s.decay[stage]));
    load_tile(p.v, barrier, to.v, chunk, chunk.batch(p), rank * kColumns);
    load_bulk(&to.W[0], from + offsetof(Operands, of[0].k), sizeof(Tile), barrier);
    load_bulk(&to.W[1], from + offsetof(Operands, of[1].k), sizeof(Tile), barrier);
    load_bulk(&to.X, from + offsetof(Operands, X), 3 * sizeof(Tile), barrier);  // and Kr, behind it
    load_bulk(s.decay[stage], from + sizeof(Operands) + offsetof(Factors, decay), sizeof(s.decay[stage]), barrier);
  }
};

struct OutputsPart {
  static constexpr int kStages = kOutputsStages;
  RecurPlan& s;
  int rank;

  __device__ __forceinline__ uint64_t* loaded(uint32_t stage) const { return &s.bar_outputs_loaded[stage]; }
  __device__ __forceinline__ uint64_t* used(uint32_t stage) const { return &s.bar_outputs_used[stage]; }
  __device__ __forceinline__ Chunk& chunk(uint32_t stage) const { return s.outputs_chunks[stage]; }
  // Outputs come after the states: all of the chunk has been taken.
  __device__ __forceinline__ void say_used(const Ring& ring, uint32_t n) const {
    if (threadIdx.x % kWarp == 0) ring.say_taken(n, rank);
  }

  __device__ __forceinline__ void load(const Params&, uint32_t stage, const Chunk&, const unsigned char* from) const {
    uint64_t* const barrier = loaded(stage);
    RecurPlan::OfOutputs& to = s.of_outputs[stage];
    Barrier::arrive_and_expect(barrier, sizeof(to) + sizeof(s.q[stage]));
    load_bulk(&to.Q[0], from + offsetof(Operands, of[0].q), sizeof(Tile), barrier);
    load_bulk(&to.Q[1], from + offsetof(Operands, of[1].q), sizeof(Tile), barrier);
    load_bulk(&to.M, from + offsetof(Operands, M), sizeof(Tile), barrier);
    load_bulk(s.q[stage], from + sizeof(Operands) + offsetof(Factors, q), sizeof(s.q[stage]), barrier);
  }
};

}  // namespace flash_kda
