// The loads: q, k and g of the chunks that this CTA prepares, v of all chunks.
#pragma once

#include "plan.h"
#include "ptx.h"
#include "timeline.h"

namespace flash_kda {

__device__ __forceinline__ void load_tile(const CUtensorMap& map, uint64_t* barrier, Tile& tile, const Chunk& chunk,
                                          int batch, int channel) {
  cute::SM90_TMA_LOAD_4D::copy(&map, barrier, uint64_t(cute::TMA::CacheHintSm90::EVICT_NORMAL), &tile, channel,
                               chunk.head, chunk.token, batch);
}

// q, k and g of an own chunk, or its end: P passes that on to X, and X to what sends chunks.
__device__ __forceinline__ void load_own(const Params& p, SharedMemoryPlan& s, const Own& own, const Chunk& chunk) {
  s.own[own.stage] = chunk;
  uint64_t* barrier = &s.bar_loaded[own.parity][own.stage];
  if (seldom(chunk.is_end())) return Barrier::arrive(barrier);
  Operands& to = s.operands[own.stage];
  Barrier::arrive_and_expect(barrier, 6 * sizeof(Tile));
  const int batch = chunk.batch(p);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    load_tile(p.q, barrier, to.of[half].q, chunk, batch, half * kHalf);
    load_tile(p.k, barrier, to.of[half].k, chunk, batch, half * kHalf);
    load_tile(p.g, barrier, to.g[half], chunk, batch, half * kHalf);
  }
}

// Chunks by which q, k and g are asked for before v. A stage is waited for that held the chunk kPair * kOwnStages
// before: its v must have been asked for. And v can be asked for when R begins with the chunk kValueStages before it,
// that is then.
constexpr int kAhead = kPair * kOwnStages - kValueStages - 1;
static_assert(kAhead + kValueStages < kChunks, "a chunk is known until R has done with it");

// One thread.
struct Load {
  const Params& p;
  SharedMemoryPlan& s;
  int rank;
  int n = 0;  // own chunks, so far
  bool end = false;
  int steps_after_end = 0;

  __device__ __forceinline__ void run() {
    Scheduler::Run run;
    s.scheduler = Scheduler(s.schedule);
    run.more = 0;
    for (int c = 0; !step(c, run); ++c) {
    }
  }

  // The next sequence of a head. This CTA's rows of its initial state go into the second-level cache, if they lie side
  // by side: R reads them some chunks later, and waits for them.
  __device__ __forceinline__ void next(Scheduler::Run& run) {
    s.scheduler.next(p, run);
    const Chunk& chunk = run.chunk;
    if (chunk.is_end() || !chunk.is(Chunk::kBegins) || p.initial_state == nullptr) return;
    if (p.initial_stride_value != kHeadDim) return;
    const int bytes = p.initial_is_fp32 ? 4 : 2;
    const int64_t row = state_row(p, chunk.sequence, p.initial_rows);
    if (row < 0) return;
    const int64_t at =
        row * p.initial_stride_sequence + chunk.head * p.initial_stride_head + rank * kColumns * kHeadDim;
    const char* const rows = static_cast<const char*>(p.initial_state) + at * bytes;
    if (reinterpret_cast<uintptr_t>(rows) % 16 == 0) prefetch(rows, kColumns * kHeadDim * bytes);
  }

  // The c-th chunk; `run` is at the one before. True after the last one.
  __device__ __forceinline__ bool step(int c, Scheduler::Run& run) {
    if (!end) {
      if (seldom(run.more == 0))
        next(run);
      else
        run.advance(p);
    }
    const Chunk& chunk = run.chunk;
    const bool mine = !end && (chunk.is_end() || c % kPair == rank);
    // The end is told to both teams, to the second one when its turn comes
    if (mine || (end && ++steps_after_end == kPair)) load_qkg(chunk);
    if (c >= kAhead && load_v(c - kAhead)) return true;
    if (seldom(end)) return false;
    s.chunks[c % kChunks] = chunk;
    end = chunk.is_end();
    return false;
  }

  // Of the c-th chunk; whether it is the end.
  __device__ __forceinline__ bool load_v(int c) {
    const Chunk chunk = s.chunks[c % kChunks];
    const int stage = c % kValueStages;
    if (c >= kValueStages) {
      mark(Stage::kWaitValues, c);
      Barrier::wait(&s.bar_v_used[stage], (c / kValueStages - 1) & 1);
    }
    mark(Stage::kLoads, c);
    uint64_t* barrier = &s.bar_v_loaded[stage];
    if (!chunk.is_end()) {
      Barrier::arrive_and_expect(barrier, sizeof(Tile));
      load_tile(p.v, barrier, s.v[stage], chunk, chunk.batch(p), rank * kColumns);
    } else {
      Barrier::arrive(barrier);
    }
    return chunk.is_end();
  }

  __device__ __forceinline__ void load_qkg(const Chunk& chunk) {
    const Own own(n++);
    if (n > kOwnStages) {  // the chunk that was there
      mark(Stage::kWaitFree, kPair * (n - 1) + rank);
      Barrier::wait(&s.bar_used[own.stage], own.parity ^ 1);
      Barrier::wait(&s.bar_copied[own.stage], own.parity ^ 1);
    }
    mark(Stage::kLoads, kPair * (n - 1) + rank);
    load_own(p, s, own, chunk);
  }
};

}  // namespace flash_kda
