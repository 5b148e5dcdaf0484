// What passes between the two CTAs of a cluster: prepared chunks, and when they may.
//
// The n-th chunk that a CTA prepares goes to the stage kOwnStages + `Received(n)` of its peer. The peer's R says
// "copied" once all of it has come: it may be overwritten where it was prepared. It says "used" once it has worked with
// it: the peer's stage may be sent to again.
#pragma once

#include "plan.h"
#include "ptx.h"
#include "timeline.h"

namespace flash_kda {

// One thread, before the peer may send the next chunk to one of the last stages.
__device__ __forceinline__ void expect_from_peer(SharedMemoryPlan& s, uint32_t stage) {
  Barrier::arrive_and_expect(&s.bar_prepared[stage], kPreparedBytes);
}

// Where R finds chunk after chunk: in a stage of its own CTA, in which it may be its peer's. The place is counted on,
// since a division takes long, and R would wait for it.
struct Prepared {
  bool own;
  uint32_t own_stage = 0, own_parity = 0, received_parity = 0;  // of the n-th chunks of both CTAs

  static_assert(kReceivedStages == 1, "else, count them too");
  __device__ __forceinline__ explicit Prepared(int rank) : own(rank == 0) {}
  __device__ __forceinline__ uint32_t stage() const { return own ? own_stage : kOwnStages; }
  __device__ __forceinline__ uint32_t parity() const { return own ? own_parity : received_parity; }

  // From the c-th chunk of both CTAs to the next one.
  __device__ __forceinline__ void advance(uint32_t c) {
    own = !own;
    if (c % kPair != kPair - 1) return;
    received_parity ^= 1;
    if (++own_stage == kOwnStages) own_stage = 0, own_parity ^= 1;
  }
};

// R: the chunk is there. The peer then may overwrite what it has sent.
__device__ __forceinline__ void wait_prepared(SharedMemoryPlan& s, const Prepared& at, int rank) {
  Barrier::wait(&s.bar_prepared[at.stage()], at.parity());
  Barrier::arrive(&s.bar_copied[at.own_stage], rank ^ 1, !at.own && threadIdx.x == 0);
}

// R, each of its warps: it has done with the chunk. Whoever put it there may put another one there: the loads of this
// CTA, or the peer.
//
// All reads are complete here, not only begun: wgmma's by its wait, those of factors because their values were used.
// The arrival alone does not order them before the peer's next copies.
__device__ __forceinline__ void give_back(SharedMemoryPlan& s, const Prepared& at, int rank) {
  if (!at.own && threadIdx.x == 0) expect_from_peer(s, at.stage());
  __syncwarp();
  Barrier::arrive(&s.bar_used[at.stage()], at.own ? rank : rank ^ 1, threadIdx.x % kWarp == 0);
}

// One thread: own chunks to the peer, as soon as they are prepared and the peer has a stage for them.
struct Copies {
  SharedMemoryPlan& s;
  int rank;

  __device__ __forceinline__ void run() const {
    for (uint32_t n = 0;; ++n) {
      const Own own(n);
      const Received there(n);
      const uint32_t c = kPair * n + rank;
      mark(Stage::kWaitPrepared, c);
      Barrier::wait(&s.bar_prepared[own.stage], own.parity);
      if (seldom(s.own[own.stage].is_end())) break;
      mark(Stage::kWaitFree, c);
      const uint32_t to = kOwnStages + there.stage;
      if (n >= kReceivedStages) Barrier::wait(&s.bar_used[to], there.parity ^ 1);
      mark(Stage::kCopy, c);
      copy_to_peer(&s.operands[own.stage], &s.operands[to], sizeof(Operands), &s.bar_prepared[to]);
      copy_to_peer(&s.factors[own.stage], &s.factors[to], sizeof(Factors), &s.bar_prepared[to]);
    }
  }
};

}  // namespace flash_kda
