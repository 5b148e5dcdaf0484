// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include <stddef.h>

#include "config.h"
#include "walk.h"

namespace flash_kda {

// Chunks that this CTA prepares ("own") alternate between the first two stages; those that its peer sends have the
// last.
constexpr int kOwnStages = 2;
constexpr int kReceivedSlot = kOwnStages;
constexpr int kOwn = 0, kReceived = 1;  // X and M
constexpr int kValueStages = 2;
constexpr int kChunks = 2 * kValueStages;  // known at a time: those of v, and as many ahead

// Where the n-th own chunk is, and the parity of the phase of that stage's barriers that is about it.
struct Own {
  uint32_t stage, parity;
  __device__ __forceinline__ explicit Own(uint32_t n) : stage(n % kOwnStages), parity(n / kOwnStages % 2) {}
};

struct SharedMemoryPlan {
  Slot slots[kOwnStages + 1];
  Triangle X[2];         // Holds L before X. Blocks above the diagonal stay zero, here and in M
  Tile M[2];             // bf16
  Tile v[kValueStages];  // bf16 [64 tokens, 64 columns]; later the output tile

  // P's scratch: cumulative log-decays of tokens 8..15 of each block (those of tokens 0..7 lie in the place of g), then
  // the columns of the block as operands for later blocks. At the end all of it holds partial sums.
  struct Scratch {
    unsigned char columns[2][kBlocks][2048];  // [half][block]; the last has no columns: its rows of k, anchored at 32
    unsigned char first_columns[2][2048];     // [half] of block 0, anchored at 32
  };
  union {
    Scratch scratch;
    unsigned char partial[2][kTriangleBlocks][1024];  // [half][block of the triangle]
    int64_t scan[2][kThreads / kWarp];                // of `List`
  };
  float block_decay[kBlocks][kHeadDim];  // in the order of fragments

  Factors factors[kOwnStages + 1];
  float kn[kOwnStages][kChunk];  // 1 / |k|

  Chunk chunks[kChunks];  // all
  Chunk own[kOwnStages];
  uint32_t number;  // of the cluster, for both CTAs in the first one's memory
  Schedule schedule;
  Walk walk;  // of the loads

  // Barriers: what they say (who arrives -> who waits). Bytes of copies count too, where there are any.
  // Of the own chunk in a stage:
  uint64_t bar_qkg_loaded[kOwnStages];      // q, k, g and own[] are there (loads -> loads, keys, P, X)
  uint64_t bar_rows_ready[kOwnStages];      // norms are known, rows past the end are cleared (loads, keys -> P)
  uint64_t bar_operands_ready[kOwnStages];  // K~, Q~, Kr and factors are written (P's warps -> R, keys)
  uint64_t bar_own_done[kOwnStages];        // R of this CTA has done with it (R's warps -> P, loads)
  uint64_t bar_peer_done[kOwnStages];       // and R of the peer (the peer's R's warps -> P, loads, keys)
  // Of the own chunk that is in X and M:
  uint64_t bar_LM_ready;  // (P's warps -> X)
  uint64_t bar_X_ready;   // (X's warps -> R)
  // Of the peer's chunk:
  uint64_t bar_received;    // operands and factors (R, armed; bytes -> R)
  uint64_t bar_X_received;  // X and M (likewise)
  // Of every chunk, by its stage of v:
  uint64_t bar_v_loaded[kValueStages];  // v and chunks[] (loads -> R)
  uint64_t bar_v_done[kValueStages];    // v and the output that took its place (R's warps -> loads)
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");
constexpr int kReceivedBytes = sizeof(Slot) + sizeof(Factors);
constexpr int kReceivedXBytes = sizeof(Triangle) + sizeof(Tile);
static_assert(offsetof(SharedMemoryPlan, factors) % 16 == 0 && sizeof(Factors) % 16 == 0, "bulk copies");

}  // namespace flash_kda
