// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include <stddef.h>

#include "config.h"
#include "scheduler.h"

namespace flash_kda {

// Chunks that this CTA prepares ("own") alternate between the first two stages; those that its peer sends have the
// last.
constexpr int kOwnStages = 2;
constexpr int kReceivedSlot = kOwnStages;
constexpr int kOwn = 0, kReceived = 1;  // X and M
constexpr int kValueStages = 1;
constexpr int kChunks = 4;  // known at a time: that of v, and some ahead

// Where the n-th own chunk is, and the parity of the phase of that stage's barriers that is about it.
struct Own {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Own(uint32_t n) : stage(n % kOwnStages), parity(n / kOwnStages % 2) {}
};

struct SharedMemoryPlan {
  Slot slots[kOwnStages + 1];
  Triangles triangles[2];  // blocks above the diagonal are zero
  Tile v[kValueStages];    // bf16 [64 tokens, 64 columns]

  // P's scratch, one after the other in the same place.
  union {
    struct {
      // Cumulative log-decays of tokens 8..15 of each block (those of tokens 0..7 lie in the place of g), then the
      // columns of the block as operands for later blocks; the last block has none: its rows of k, anchored at 32.
      unsigned char columns[2][kBlocks][2048];  // [half][block]
      unsigned char first_columns[2][2048];     // [half] of block 0, anchored at 32
    };
    unsigned char partial[2][kTriangleBlocks][1024];  // sums over half of the channels: [half][block of the triangle]
    int64_t scan[2][kThreads / kWarp];                // of `List`
  } scratch;
  float block_decay[kBlocks][kHeadDim];  // in the order of fragments

  Factors factors[kOwnStages + 1];
  float kn[kOwnStages][kChunk];  // 1 / |k|
  float b[kOwnStages][kChunk];   // sigmoid(beta)

  Chunk chunks[kChunks];  // all
  Chunk own[kOwnStages];
  uint32_t number;  // of the cluster, for both CTAs in the first one's memory
  Schedule schedule;
  Scheduler scheduler;  // of the loads

  // Barriers: what they say (who arrives -> who waits). Bytes of copies count too, where there are any.
  // Of the own chunk in a stage:
  uint64_t bar_loaded[kOwnStages];       // q, k, g and own[] are there (loads -> rows, P)
  uint64_t bar_rows_ready[kOwnStages];   // norms are known, rows past the end are cleared (rows -> P)
  uint64_t bar_prepared[kOwnStages];     // its operands and factors are written (P -> R, X)
  uint64_t bar_used[kOwnStages];         // R of this CTA has done with it (R -> P, loads)
  uint64_t bar_copied[kOwnStages];       // the peer has its copy (the peer's R -> P, loads)
  uint64_t bar_used_by_peer[kOwnStages];  // and has done with it (the peer's R -> X)
  // Of the own chunk in triangles[kOwn]:
  uint64_t bar_L_ready;  // (P -> X)
  uint64_t bar_X_ready;  // X b is written (X -> P)
  // Of the peer's chunk:
  uint64_t bar_received;  // operands and factors (R, armed; bytes -> R)
  // Of every chunk, by its stage of v:
  uint64_t bar_v_loaded[kValueStages];  // v and chunks[] (loads -> R)
  uint64_t bar_v_used[kValueStages];    // v is in registers (R -> loads)
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");
static_assert(offsetof(SharedMemoryPlan, factors) % 16 == 0 && sizeof(Factors) % 16 == 0, "bulk copies");

}  // namespace flash_kda
