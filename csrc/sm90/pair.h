// What passes between the two CTAs of a cluster: prepared chunks, and when they may.
//
// A chunk goes from the stage of the CTA that prepared it to the slot `kReceivedSlot` of its peer. The peer's R says
// "copied" once it has all of it: the stage is free. It says "used" once it has worked with it: the slot is free.
#pragma once

#include "plan.h"
#include "ptx.h"

namespace flash_kda {

constexpr int kReceivedBytes = sizeof(Slot) + sizeof(Triangles) + sizeof(Factors);

// One thread, before the peer may send the next chunk.
__device__ __forceinline__ void expect_from_peer(SharedMemoryPlan& s) {
  Barrier::arrive_and_expect(&s.bar_received, kReceivedBytes);
}

// R: the n-th chunk that the peer has prepared, in `stage` there, has come; the peer may overwrite that stage.
__device__ __forceinline__ void wait_received(SharedMemoryPlan& s, uint32_t n, uint32_t stage, int rank) {
  Barrier::wait(&s.bar_received, n % 2);
  Barrier::arrive(&s.bar_copied[stage], rank ^ 1, threadIdx.x == 0);
}

// Each warp of R: the peer may send the next chunk.
//
// All reads of what came are complete here, not only begun: wgmma's by its wait, those of factors because their values
// were used. The arrival alone does not order them before the peer's next copies.
__device__ __forceinline__ void tell_used(SharedMemoryPlan& s, uint32_t stage, int rank) {
  if (threadIdx.x == 0) expect_from_peer(s);
  __syncwarp();
  Barrier::arrive(&s.bar_used_by_peer[stage], rank ^ 1, threadIdx.x % kWarp == 0);
}

// One thread: the n-th own chunk to the peer, as soon as it is prepared and the peer has done with the one before.
__device__ __forceinline__ void copy_chunk(SharedMemoryPlan& s, uint32_t n) {
  const Own own(n), before(n - 1);
  Barrier::wait(&s.bar_prepared[own.stage], own.parity);
  if (n > 0) Barrier::wait(&s.bar_used_by_peer[before.stage], before.parity);
  // What R takes first goes first
  copy_to_peer(&s.triangles[kOwn], &s.triangles[kReceived], sizeof(Triangles), &s.bar_received);
  copy_to_peer(&s.slots[own.stage], &s.slots[kReceivedSlot], sizeof(Slot), &s.bar_received);
  copy_to_peer(&s.factors[own.stage], &s.factors[kReceivedSlot], sizeof(Factors), &s.bar_received);
}

}  // namespace flash_kda
