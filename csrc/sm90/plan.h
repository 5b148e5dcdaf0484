// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include <stddef.h>

#include "config.h"
#include "scheduler.h"

namespace flash_kda {

// Chunks that this CTA prepares ("own") take turns in `kOwnStages` stages. Those that its peer sends take turns in the
// `kReceivedStages` stages behind them, one for each team.
constexpr int kOwnStages = 4;
constexpr int kReceivedStages = kTeams;
constexpr int kStages = kOwnStages + kReceivedStages;
constexpr int kValueStages = 2;
constexpr int kChunks = 16;  // known at a time: those of v, and some ahead

// Where the n-th own chunk is, and the parity of the phase of that stage's barriers that is about it.
struct Own {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Own(uint32_t n) : stage(n % kOwnStages), parity(n / kOwnStages % 2) {}
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

  // Of a warp of P: cumulative log-decays of tokens 0..7 of its block (those of tokens 8..15 lie in the place of g);
  // then the columns of block 0 as operands for block 1; then sums over its half of the channels.
  struct Scratch {
    unsigned char bytes[2048];
  };
  Scratch scratch[kTeams][2][kBlocks];           // [team][half][block]
  float block_decay[kTeams][kBlocks][kHeadDim];  // in the order of fragments
  float squares[kTeams][2][2][kChunk];           // of rows, over half of the channels: [team][half][q, k]

  Factors factors[kStages];
  float kn[kOwnStages][kChunk];  // 1 / |k|
  float b[kOwnStages][kChunk];   // sigmoid(beta)

  Chunk chunks[kChunks];  // every chunk, own or the peer's
  Chunk own[kOwnStages];
  uint32_t number;  // of the cluster, for both CTAs in the first one's memory
  Schedule schedule;
  Scheduler scheduler;                // of the loads
  int64_t scan[2][kThreads / kWarp];  // of `List`

  // Barriers: what they say (who arrives -> who waits). Bytes of copies count too, where there are any.
  // Of the own chunk in a stage:
  uint64_t bar_loaded[kOwnStages];   // q, k, g and own[] are there (loads -> P, X, copies)
  uint64_t bar_L_ready[kOwnStages];  // L, M, Q~, K~ and Kr are written (P -> X)
  uint64_t bar_copied[kOwnStages];   // the peer has its copy (the peer's R -> loads)
  // Of the chunk in a stage, own or the peer's:
  uint64_t bar_prepared[kStages];  // all of it is there (X -> R, copies; the peer's: R, armed, and bytes -> R)
  uint64_t bar_used[kStages];      // R has done with it (R -> loads; of what was sent to the peer: its R -> copies)
  // Of every chunk, by its stage of v:
  uint64_t bar_v_loaded[kValueStages];  // v and chunks[] are there (loads -> R)
  uint64_t bar_v_used[kValueStages];    // v is in registers (R -> loads)
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");
static_assert(offsetof(SharedMemoryPlan, factors) % 16 == 0 && sizeof(Factors) % 16 == 0, "bulk copies");

}  // namespace flash_kda
