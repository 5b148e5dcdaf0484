// Tile sizes, roles and the shared-memory plan of the kernel.
#pragma once

#include <stdint.h>

namespace flash_kda {

constexpr int kChunk = 64;         // tokens
constexpr int kBlock = 16;         // tokens of a block: exponents are anchored per block
constexpr int kBlocks = kChunk / kBlock;
constexpr int kHeadDim = 128;      // K and V
constexpr int kHalf = 64;          // channels of a 128-byte swizzled tile
constexpr int kColumns = 64;       // value columns of a CTA: a head is shared by two
constexpr int kColumnSplits = kHeadDim / kColumns;
constexpr int kSlots = 3;          // chunks of q, k, g in flight: loading, being prepared, being consumed
constexpr int kValueSlots = 2;

// Roles, by warpgroup. Registers: 65536 / 128 = 512 for the four of them.
constexpr int kWarpgroup = 128;
constexpr int kRecurWarpgroup = 0;
constexpr int kPrepareWarpgroups = 2;  // 1 and 2
constexpr int kInvertWarpgroup = 3;
constexpr int kThreads = 4 * kWarpgroup;
constexpr int kPrepareThreads = kPrepareWarpgroups * kWarpgroup;
constexpr int kRecurRegisters = 208;
constexpr int kPrepareRegisters = 112;
constexpr int kInvertRegisters = 80;
static_assert(kRecurRegisters + kPrepareWarpgroups * kPrepareRegisters + kInvertRegisters <= 512, "register file");

// Two tiles of 64 rows x 128 bytes, 16-byte units XORed with the row (the 128-byte swizzle of TMA and wgmma).
constexpr int kTileBytes = kChunk * 128;
struct alignas(1024) Tile {
  unsigned char bytes[kTileBytes];
};

// q, k, g as loaded; prepared in place: Q~, K~ and Kr. [half of the channels]
struct Slot {
  Tile q[2], k[2], g[2];
};

struct SharedMemoryPlan {
  Slot slots[kSlots];
  Tile X[2];  // fp32 (tf32) [64 rows, 64 columns]: two tiles of 32 columns. Holds L before X. Upper blocks stay zero.
  Tile M[2];  // likewise
  // One 4 KB region per preparing warp (block, half of the channels): decays from the start of the block, fp32
  // [16 tokens, 64 channels]; afterwards the first half holds the column operand of L and M, fp16, while the decays
  // of the last token stay readable.
  unsigned char scratch[8][4096];
  Tile v[kValueSlots];  // bf16 [64 tokens, 64 columns]; later the output tile
  float decay[2][kHeadDim];  // exp(G_C), by parity of the chunk
  float b[2][kChunk];        // sigmoid(beta), by parity of the chunk
  float norm[2][kChunk];     // 1 / |q|, 1 / |k|

  uint64_t bar_qkg_loaded[kSlots];
  uint64_t bar_v_loaded[kValueSlots];
  uint64_t bar_operands_ready[kSlots];  // Q~, K~, Kr, decay, b
  uint64_t bar_L_ready;
  uint64_t bar_XM_ready;
  uint64_t bar_XM_free;
};
static_assert(sizeof(SharedMemoryPlan) <= 232448, "227 KB of shared memory a CTA");

}  // namespace flash_kda
