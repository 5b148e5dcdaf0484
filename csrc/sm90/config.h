// Tile sizes, roles and the shared-memory plan of the kernel.
#pragma once

#include <stdint.h>

namespace flash_kda {

constexpr int kChunk = 64;  // tokens
constexpr int kBlock = 16;  // tokens of a block: exponents are anchored per block
constexpr int kBlocks = kChunk / kBlock;
constexpr int kHeadDim = 128;  // K and V
constexpr int kHalf = 64;      // channels of a 128-byte swizzled tile
constexpr int kColumns = 64;   // value columns of a CTA: a head is shared by two
constexpr int kColumnSplits = kHeadDim / kColumns;
constexpr int kSlots = 3;       // chunks of q, k, g in flight: loading, being prepared, being consumed
constexpr int kValueSlots = 2;  // as many as parities of the chunk: the recurrence counts both at once

// Roles, by warpgroup. Registers: 65536 / 128 = 512 for the four of them.
constexpr int kWarpgroup = 128;
constexpr int kRecurWarpgroup = 0;
constexpr int kPrepareWarpgroups = 2;  // 1 and 2
constexpr int kInvertWarpgroup = 3;
constexpr int kThreads = 4 * kWarpgroup;
constexpr int kPrepareThreads = kPrepareWarpgroups * kWarpgroup;
constexpr int kRecurRegisters = 208;
constexpr int kPrepareRegisters = 120;
constexpr int kInvertRegisters = 64;
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

// What there is to do with a slot.
struct Chunk {
  static constexpr int kEnd = -1;
  int64_t token;  // first token, in its batch row
  int valid;      // tokens, up to 64. 0: a sequence without tokens, only its state passes; kEnd: nothing is left
  int sequence;
  int batch;
  int head;
  int column;        // first value column
  bool first, last;  // of the sequence
};

}  // namespace flash_kda
