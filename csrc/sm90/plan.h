// The shared-memory plan: a type, not arithmetic on byte offsets.
#pragma once

#include "config.h"
#include "walk.h"

namespace flash_kda {

// Chunks that this CTA prepares alternate between the first two stages; those that its peer sends have the last one.
constexpr int kOwnStages = 2;
constexpr int kReceived = kOwnStages;
constexpr int kValueStages = 2;
constexpr int kChunks = 2 * kValueStages;  // known at a time: those of v, and as many ahead

struct SharedMemoryPlan {
  Slot slots[kOwnStages + 1];
  Triangle X[2];         // own, received. Holds L before X. Blocks above the diagonal stay zero, here and in M
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
    int64_t scan[2][kThreads / kWarp];                // of `make_schedule`
  };
  float block_decay[kBlocks][kHeadDim];  // in the order of fragments

  Factors factors[kOwnStages + 1];
  float k_factor[kOwnStages][kChunk];  // 1 / |k|

  Chunk chunks[kChunks];  // all
  Chunk own[kOwnStages];
  Schedule schedule;
  Walk walk;  // of the loads

  uint64_t bar_qkg_loaded[kOwnStages];  // and own[]
  uint64_t bar_rows_ready[kOwnStages];  // norms are known, rows past the end are cleared
  uint64_t bar_operands_ready[kOwnStages];
  uint64_t bar_own_done[kOwnStages];   // R of this CTA has done with an own chunk
  uint64_t bar_peer_done[kOwnStages];  // R of the peer has done with it
  uint64_t bar_LM_ready;
  uint64_t bar_X_ready;
  uint64_t bar_received;                // operands and factors
  uint64_t bar_X_received;              // X and M
  uint64_t bar_v_loaded[kValueStages];  // and chunks[]
  uint64_t bar_v_done[kValueStages];
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");
constexpr int kReceivedBytes = sizeof(Slot) + sizeof(Factors);
constexpr int kReceivedXBytes = sizeof(Triangle) + sizeof(Tile);

}  // namespace flash_kda
