// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include <stddef.h>

#include "config.h"
#include "ring_schedule.h"
#include "scheduler.h"
#include "timeline.h"

namespace flash_kda {

// Chunks that this CTA prepares ("own") take turns in `kOwnStages` stages. Those that its peer sends take turns in the
// `kReceivedStages` stages behind them.
constexpr int kOwnStages = 5;
constexpr int kReceivedStages = 1;
constexpr int kStages = kOwnStages + kReceivedStages;
constexpr int kValueStages = 2;
constexpr int kChunks = 16;  // known at a time: those of v, and some ahead

// Where the n-th own chunk is, and the parity of the phase of that stage's barriers that is about it.
//
// What a team waits for has two barriers a stage, for every second chunk in it: each then is about chunks of one team.
// With one, a team could take the phase before for its own, because the other team may be late.
struct Own {
  uint32_t stage, parity, team_parity;
  __device__ __forceinline__ explicit Own(uint32_t n)
      : stage(n % kOwnStages), parity(n / kOwnStages % 2), team_parity(n / kOwnStages / 2 % 2) {}
};

// Where the n-th one of the peer is.
struct Received {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Received(uint32_t n)
      : stage(n % kReceivedStages), parity(n / kReceivedStages % 2) {}
};

struct SharedMemoryPlan {
  Operands operands[kStages];
  Tile v[kValueStages];  // bf16 [32 tokens, 64 columns]

  // Of a warp of P: most of what it gives to another one, sums over some of the channels.
  struct Scratch {
    unsigned char bytes[2048];
  };
  Scratch scratch[kTeams][kTeamWarps];
  // The gate of the head that a warp of P works on.
  struct Gate {
    int head;
    float rate;  // base 2 and negative
  };
  Gate gate[kTeams * kTeamWarps];
  uint4 triangle[kWarp];                         // of ones, by lane
  float bias[kTeams * kTeamWarps][kWarp];        // of its channels, in pairs that are 8 apart
  float squares[kTeams][kTeamWarps][2][kChunk];  // of rows, over its channels: [team][warp][q, k]

  Factors factors[kStages];
  float kn[kOwnStages][kChunk];  // 1 / |k|
  float b[kOwnStages][kChunk];   // sigmoid(beta)

  Chunk chunks[kChunks];  // every chunk, own or the peer's
  Chunk own[kOwnStages];
  uint32_t number;  // of the cluster, for both CTAs in the first one's memory
  Schedule schedule;
  Scheduler scheduler;            // of the loads
  int scan[4][kThreads / kWarp];  // of `List`

  // Where P has multiprocessors of its own: the schedule, and where in the ring an own chunk goes.
  RingSchedule ring;
  struct Place {
    int item, chunk;
  };
  Place place[kOwnStages];

  // Barriers: what they say (who arrives -> who waits). Bytes of copies count too, where there are any.
  // Of the own chunk in a stage:
  uint64_t bar_loaded[2][kOwnStages];   // q, k, g and own[] are there (loads -> P); [parity]
  uint64_t bar_L_ready[2][kOwnStages];  // L, M, Q~, K~ and Kr are written (P -> X); [parity]
  uint64_t bar_copied[kOwnStages];      // the peer has its copy (the peer's R -> loads)
  // Of the chunk in a stage, own or the peer's:
  uint64_t bar_prepared[kStages];  // all of it is there (X -> R, copies; the peer's: R, armed, and bytes -> R)
  uint64_t bar_used[kStages];      // R has done with it (R -> loads; of what was sent to the peer: its R -> copies)
  // Of every chunk, by its stage of v:
  uint64_t bar_v_loaded[kValueStages];  // v and chunks[] are there (loads -> R)
  uint64_t bar_v_used[kValueStages];    // v is in registers (R -> loads)

#ifdef FLASH_KDA_TIMELINE
  TimelineCounts timeline;  // room for them: they lie at the end, behind what aligns it
#endif
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");
static_assert(offsetof(SharedMemoryPlan, factors) % 16 == 0 && sizeof(Factors) % 16 == 0, "bulk copies");

}  // namespace flash_kda
