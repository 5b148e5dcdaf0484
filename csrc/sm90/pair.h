// What passes between the two CTAs of a cluster: prepared chunks, and when they may.
//
// The n-th chunk that a CTA prepares goes to the stage `Received(n)` of its peer. The peer's R says "copied" once all of
// it has come: it may be overwritten where it was prepared. It says "used" once it has worked with it: the stage of the
// peer is free.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr int kReceivedBytes = sizeof(Operands) + sizeof(Factors);

// One thread, before the peer may send the next chunk to a stage.
__device__ __forceinline__ void expect_from_peer(SharedMemoryPlan& s, uint32_t stage) {
  Barrier::arrive_and_expect(&s.bar_received[stage], kReceivedBytes);
}

// R: the n-th chunk of the peer has come.
__device__ __forceinline__ void wait_received(SharedMemoryPlan& s, uint32_t n, int rank) {
  const Received at(n);
  Barrier::wait(&s.bar_received[at.stage], at.parity);
  Barrier::arrive(&s.bar_copied[Own(n).stage], rank ^ 1, threadIdx.x == 0);
}

// R, all its warps: the stage where the n-th chunk of the peer was is free.
//
// All reads of what came are complete here, not only begun: wgmma's by its wait, those of factors because their values
// were used. The arrival alone does not order them before the peer's next copies.
__device__ __forceinline__ void tell_used(SharedMemoryPlan& s, uint32_t n, int rank) {
  const Received at(n);
  if (threadIdx.x == 0) expect_from_peer(s, at.stage);
  __syncwarp();
  Barrier::arrive(&s.bar_used_by_peer[at.stage], rank ^ 1, threadIdx.x % kWarp == 0);
}

// One thread: the n-th own chunk, which is prepared, to the peer, as soon as that has a stage for it.
__device__ __forceinline__ void copy_chunk(SharedMemoryPlan& s, uint32_t n) {
  const Own own(n);
  const Received there(n);
  const uint32_t to = kOwnStages + there.stage;
  if (n >= kReceivedStages) Barrier::wait(&s.bar_used_by_peer[there.stage], there.parity ^ 1);
  copy_to_peer(&s.operands[own.stage], &s.operands[to], sizeof(Operands), &s.bar_received[there.stage]);
  copy_to_peer(&s.factors[own.stage], &s.factors[to], sizeof(Factors), &s.bar_received[there.stage]);
}

}  // namespace flash_kda
